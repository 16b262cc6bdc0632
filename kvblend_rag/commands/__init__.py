"""The verbs of the `kvblend` command, one file each."""
