"""A session that measures the time spent in its steps. Knows no backend and no ring."""

from time import perf_counter

from runtime.backends.session import Ids, Logits, Session


class ClockedSession:
    """Passes every call on to `session`; `seconds` adds up the duration of its steps."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.batch, self.partial = session.batch, session.partial
        self.resize, self.read_row = session.resize, session.read_row
        self.write_row = session.write_row
        self.seconds = 0.0

    def step(
        self, input_ids: Ids, position_ids: Ids, logits_indices: Ids, first: int = 0
    ) -> Logits:
        """Run a step, as `Session.step` says, and add its duration to `seconds`."""
        began = perf_counter()
        logits = self._session.step(input_ids, position_ids, logits_indices, first)
        self.seconds += perf_counter() - began
        return logits
