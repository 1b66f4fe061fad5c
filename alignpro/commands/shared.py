"""What several verbs share: the protocol of a verb, reading rollouts, telling a result."""

import json
import os
from typing import Any, Protocol


class Verb(Protocol):
    """A subcommand: parsed arguments, and what they do."""

    def run(self) -> int:
        """Do it; the exit status: 0, or 1 for a finding such as a violated bound."""
        ...


def read_rollouts(file: str, out: str | None) -> Any:
    from alignpro import rollouts
    from alignpro.files import writable_folder

    if out is not None:
        writable_folder(out)
    return rollouts.read(file)


def tell(name: str, values: dict[str, Any], text: str, as_json: bool, out: str | None) -> None:
    """Print a result, as text or JSON, and keep it as `name`.json in the folder `out`."""
    from alignpro.files import write_json

    if out is not None:
        write_json(os.path.join(out, f"{name}.json"), values)
    print(json.dumps(values, ensure_ascii=False, allow_nan=False) if as_json else text)
