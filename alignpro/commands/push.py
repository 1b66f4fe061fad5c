"""`alignpro push`: a trained prompter to the hub."""

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a trained prompter, or the whole model that merge made of it, to the hub, with its card.

    Weights in safetensors, configuration and card go, and nothing else of the folder; absolute paths of this
    machine are left out of them. Log in first: hf auth login.
    """

    folder: tyro.conf.Positional[str]
    """Folder of the model, or of the run that trained it."""
    repository: tyro.conf.Positional[str]
    """The repository, as owner/name; made if it is not there."""
    private: bool = False
    """Let the owner alone see a repository that is made now."""

    examples = (
        ("the prompter of a run", "alignpro push runs/ease owner/ease-prompter"),
        ("a whole model, for its owner alone", "alignpro push models/ease owner/ease --private"),
    )

    def run(self) -> int:
        from alignpro.commands.opening import trained_home
        from alignpro.llm.models import hub, packages

        home = Path(trained_home(self.folder)).expanduser()
        hub.check_repository(self.repository)
        names = ", ".join(hub.shared_files(home))
        packages.note(f"uploading {names} to {self.repository}")
        print(f"wrote {hub.push(home, self.repository, private=self.private)}")
        return 0
