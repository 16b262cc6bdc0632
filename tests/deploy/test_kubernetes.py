"""The manifests against Kubernetes' own schemas, and against each other and this package."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from kvblend_rag.address import RemoteAddress
from kvblend_rag.cli import _parser
from kvblend_rag.config import BlendConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.31", "1.34", kubernetes_validate.latest_version())
MANIFESTS = [
    (f"{path.name}-{manifest['kind']}", manifest)
    for path in sorted(FOLDER.glob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
OF_KIND: dict[str, list] = {}
for _, each in MANIFESTS:
    OF_KIND.setdefault(each["kind"], []).append(each)
WORKLOADS = [each for kind in ("Deployment", "StatefulSet", "Job") for each in OF_KIND[kind]]
PODS = [each["spec"]["template"] for each in WORKLOADS]
CONTAINERS = [container for pod in PODS for container in pod["spec"]["containers"]]
OURS = [each for each in CONTAINERS if each["image"].startswith("kvblend-rag:")]


def named(name):
    return next(each for each in CONTAINERS if each["name"] == name)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [each for _, each in MANIFESTS], ids=[name for name, _ in MANIFESTS])
def test_every_manifest_is_of_its_schema(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_validator_finds_what_is_wrong():
    (deployment,) = OF_KIND["Deployment"]
    spec = {**deployment["spec"], "replica": 2}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**deployment, "spec": spec}, VERSIONS[-1], strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**deployment, "spec": {**deployment["spec"], "replicas": "two"}}, VERSIONS[-1])


def test_what_is_asked_for_is_there():
    assert {kind: len(found) for kind, found in OF_KIND.items()} == {
        "ConfigMap": 1, "Deployment": 1, "StatefulSet": 1, "Job": 1, "Service": 2, "PodDisruptionBudget": 1,
        "NetworkPolicy": 1,
    }  # fmt: skip
    assert OF_KIND["Deployment"][0]["spec"]["replicas"] >= 2
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= named("server").keys()


def test_selectors_find_pods_and_ports_have_the_names_that_are_asked_for():
    labels = [pod["metadata"]["labels"] for pod in PODS]
    ports = {port["name"] for each in CONTAINERS for port in each.get("ports", ())}

    def found(selector):
        return [each for each in labels if selector.items() <= each.items()]

    for workload, pod in zip(WORKLOADS, PODS, strict=True):
        if "selector" in workload["spec"]:
            assert workload["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    for service in OF_KIND["Service"]:
        assert len(found(service["spec"]["selector"])) == 1
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert len(found(OF_KIND["PodDisruptionBudget"][0]["spec"]["selector"]["matchLabels"])) == 1
    (policy,) = OF_KIND["NetworkPolicy"]
    assert len(found(policy["spec"]["podSelector"]["matchLabels"])) == 1
    allowed = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]
    assert len(found(allowed)) == len(PODS)
    for container in CONTAINERS:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for how in ("httpGet", "tcpSocket"):
                port = container.get(probe, {}).get(how, {}).get("port")
                assert port is None or port in {each["name"] for each in container["ports"]}


def test_mounts_have_volumes_and_maps_exist():
    maps = {each["metadata"]["name"] for each in OF_KIND["ConfigMap"]}
    for pod in PODS:
        volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", ())}
        used = {mount["name"] for each in pod["spec"]["containers"] for mount in each.get("volumeMounts", ())}
        assert used == volumes.keys()
        assert {volume["configMap"]["name"] for volume in volumes.values() if "configMap" in volume} <= maps


def test_secrets_are_those_that_the_page_makes():
    """No secret stands in the repository: the page says how one is made."""
    assert "Secret" not in OF_KIND
    page = (ROOT / "docs" / "deployment.md").read_text()
    made = set(re.findall(r"--from-literal=([\w-]+)=", page))
    used = [
        variable["valueFrom"]["secretKeyRef"]
        for each in CONTAINERS
        for variable in each.get("env", ())
        if "valueFrom" in variable
    ]
    assert {each["name"] for each in used} == {"kvblend"}
    assert {each["key"] for each in used} == made
    assert "kubectl create secret generic kvblend" in page


def test_pods_are_confined():
    for pod in PODS:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    for container in CONTAINERS:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_the_configuration_is_ours(monkeypatch, tmp_path):
    (given,) = OF_KIND["ConfigMap"]
    path = tmp_path / "kv_blend.yaml"
    path.write_text(given["data"]["kv_blend.yaml"])
    for container in OURS:
        environment = {each["name"]: each.get("value", "s3cret") for each in container["env"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert environment["KVBLEND_CONFIG_FILE"] == f"{mounts['config']}/kv_blend.yaml"
        url = environment["KVBLEND_REMOTE"].replace("$(VALKEY_PASSWORD)", environment["VALKEY_PASSWORD"])
        monkeypatch.setenv("KVBLEND_CONFIG_FILE", str(path))
        monkeypatch.setenv("KVBLEND_REMOTE", url)
        config = BlendConfig.load()
        assert config.store_path == mounts["store"]
        assert config.encryption_key.removeprefix("env:") in environment
        # Kubernetes fills in what stands before
        names = [each["name"] for each in container["env"]]
        assert names.index("VALKEY_PASSWORD") < names.index("KVBLEND_REMOTE")
        (remote,) = config.remote
        assert RemoteAddress.parse(remote).url.hostname in {each["metadata"]["name"] for each in OF_KIND["Service"]}
        memory = _gib(container["resources"]["limits"]["memory"])
        if container["name"] != "sync":
            assert config.max_memory_gb < memory
    server = next(volume for volume in PODS[0]["spec"]["volumes"] if volume["name"] == "store")
    assert config.max_disk_gb < _gib(server["emptyDir"]["sizeLimit"])
    valkey = named("valkey")
    maximum = int(valkey["args"][valkey["args"].index("--maxmemory") + 1].removesuffix("gb"))
    room = _gib(valkey["resources"]["limits"]["memory"]) * 2**30
    assert RemoteAddress.parse(remote).max_bytes < maximum * 2**30 < room


def _gib(quantity):
    return float(quantity.removesuffix("Gi"))


@pytest.mark.parametrize("container", OURS, ids=lambda each: each["name"])
def test_commands_are_ours(container):
    """The image's entry point is kvblend."""
    verb, *arguments = container["args"]
    parsed, rest = _parser().parse_known_args(container["args"])
    assert parsed.handler
    assert rest == (arguments if verb == "serve" else []), "what is not ours is vLLM's"
    if container["name"] == "ingest":
        assert parsed.ray
        assert parsed.folder in {mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_image_has_the_version_of_the_package_and_a_supported_vllm():
    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"', text, re.MULTILINE)
    assert {each["image"] for each in OURS} == {f"kvblend-rag:{version}"}
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"kvblend-rag:{version}" in dockerfile
    (vllm,) = re.findall(r"^ARG VLLM=v(.+)$", dockerfile, re.MULTILINE)
    assert f"<={vllm}" in text
    extras = re.search(r'"/src\[(.+)\]"', dockerfile)[1].split(",")
    assert all(re.search(rf"^{extra} = ", text, re.MULTILINE) for extra in extras)
