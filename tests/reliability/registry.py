"""Every target of fuzzing, in the order of the table. A new one is added here, and only here."""

from tests.reliability import bundles, checkpoints, texts, vocabularies
from tests.reliability.target import Target

TARGETS: tuple[Target, ...] = (
    *bundles.TARGETS,
    *checkpoints.TARGETS,
    *vocabularies.TARGETS,
    *texts.TARGETS,
)
