import pytest

from kvblend_rag.commands.demo import _speed


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([2.7, 2.5, 3.0], "[bold]First token 2.7× sooner[/] (median; 2.5× to 3.0×)"),
        ([1.0], "[bold]First token 1.0× sooner[/] (median; 1.0× to 1.0×)"),
        ([0.5, 0.8, 1.25], "[bold]First token 1.2× later[/] (median; 0.8× to 2.0×)"),
    ],
)
def test_a_blend_that_is_slower_is_called_so(ratios, said):
    assert _speed(ratios) == said
