"""Machine code, kept on disk where it can be."""

from typing import Any

import pytest

from graphopt.compiled import compiled


def twice(x: Any) -> Any:
    return 2 * x


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_function_is_compiled_once(on_disk: bool) -> None:
    fast = compiled(twice, on_disk=on_disk)
    assert fast(21) == 42 and fast(0.5) == 1.0
    assert compiled(twice, on_disk=on_disk) is fast


def test_without_a_folder_to_keep_it_in_it_is_compiled_all_the_same() -> None:
    names: dict[str, Any] = {}
    exec(compile("def thrice(x): return 3 * x", "<nowhere>", "exec"), names)
    assert compiled(names["thrice"], on_disk=True)(5) == 15
