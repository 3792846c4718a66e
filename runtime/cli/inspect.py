"""The command inspect. Knows only the command line."""

import json

from runtime.cli import options
from runtime.system.progress import stage_for


def inspect(
    *,
    bundle: options.BundlePath,
    require_signature: options.RequireSignature = None,
    as_json: options.Json = False,
) -> None:
    """Check every file of a bundle, and describe the bundle."""
    from runtime.bundle.describe import describe, facts
    from runtime.bundle.open import open_bundle

    with stage_for(quiet=as_json)("Checking the bundle", None):
        opened = open_bundle(bundle, require_signature=require_signature)
    print(json.dumps(facts(opened)) if as_json else describe(opened))
