"""The half that would compile."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    """Takes the target `cpu`, and compiles nothing for it."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: Any) -> Any:
        return options

    def add_stages(self, *_: Any) -> None:
        raise RuntimeError("this backend compiles nothing: set TRITON_INTERPRET=1")

    def load_dialects(self, _: Any) -> None:
        """There are none."""

    def get_module_map(self) -> dict[str, Any]:
        return {}
