"""The errors of graphopt: one family, so that `except GraphoptError` catches them all."""


class GraphoptError(Exception):
    """Base of all errors that graphopt raises on purpose."""


class TraceError(GraphoptError):
    """A model and its inputs could not be made into a Program."""


class VerifyError(GraphoptError):
    """A Program breaks a rule that all Programs keep; the message shows the node and its place."""


class PlanError(GraphoptError):
    """A pass cannot meet the bound it was given.

    `reachable_bytes` is the best it could do instead, a peak in bytes; None where the bound is not
    one of memory.

    >>> error = PlanError("no plan stays under 1024 bytes", reachable_bytes=4096)
    >>> str(error), error.reachable_bytes
    ('no plan stays under 1024 bytes', 4096)
    """

    def __init__(
        self, message: str, *, reachable_bytes: int | None = None, budget_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.reachable_bytes = reachable_bytes
        self.budget_bytes = budget_bytes


class CodegenError(GraphoptError):
    """A backend cannot generate code for a region; the message names the op."""
