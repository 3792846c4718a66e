"""All fuzzing targets and trials, in the order of the tables. Add new ones here."""

from tests.reliability.harness.target import Target
from tests.reliability.harness.trial import Trial
from tests.reliability.targets import (
    bundles,
    calibration,
    chat_templates,
    checkpoints,
    server,
    snapshots,
    tokenizers,
)
from tests.reliability.trials import commands, servers, session_files

TARGETS: tuple[Target, ...] = (
    *bundles.TARGETS,
    *checkpoints.TARGETS,
    *tokenizers.TARGETS,
    *chat_templates.TARGETS,
    *calibration.TARGETS,
    *snapshots.TARGETS,
    *server.TARGETS,
)
TRIALS: tuple[Trial, ...] = (*commands.TRIALS, *session_files.TRIALS, *servers.TRIALS)
