"""Every target of fuzzing and every trial, in the order of the tables. New ones are added here."""

from tests.reliability import (
    application,
    bundles,
    checkpoints,
    servers,
    sessions,
    snapshots,
    texts,
    trials,
    vocabularies,
)
from tests.reliability.target import Target
from tests.reliability.trial import Trial

TARGETS: tuple[Target, ...] = (
    *bundles.TARGETS,
    *checkpoints.TARGETS,
    *vocabularies.TARGETS,
    *texts.TARGETS,
    *snapshots.TARGETS,
    *application.TARGETS,
)
TRIALS: tuple[Trial, ...] = (*trials.TRIALS, *sessions.TRIALS, *servers.TRIALS)
