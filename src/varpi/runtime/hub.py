"""Repositories of the Hugging Face Hub, downloaded file by file into its cache, or found there without a network."""

import re
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError

ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<file>.+))?")
""""org/name", with "@revision" and ":file" where one is wanted."""


class Repository:
    """The files of a model's repository.

    Raises VarpiError when it does not exist, needs permission, or can be neither reached nor found in the cache.
    """

    def __init__(self, repo: str, revision: str | None) -> None:
        import huggingface_hub as hub  # not at the top: a second to import, seldom needed

        self.repo, self.revision = repo, revision
        self.where = f"{repo}@{revision}" if revision else repo
        self._cached: Path | None = None
        """The folder of what was downloaded before, when the Hub cannot be reached."""
        try:
            # Asked first, because it gives up after ten seconds without a network; a download would try again and again
            listing = hub.HfApi().model_info(repo, revision=revision, timeout=10).siblings or []
            self.names = [sibling.rfilename for sibling in listing]
        except Exception as error:
            self._refuse(error)
            self._cached = self._find()
            if self._cached is None:
                raise VarpiError(
                    f"{self.where}: no such file or directory here, the Hub cannot be reached "
                    f"({type(error).__name__}), and its cache does not hold it; download it where there is a network "
                    "and pass the directory"
                ) from error
            self.names = [entry.name for entry in self._cached.iterdir()]

    def file(self, name: str) -> Path:
        """Where a file of the repository lies, downloaded if need be."""
        import huggingface_hub as hub

        if self._cached is not None:
            if not (self._cached / name).is_file():
                raise VarpiError(f"{self.where}: the Hub cannot be reached, and its cache does not hold {name!r}")
            return self._cached / name
        try:
            return Path(hub.hf_hub_download(self.repo, name, revision=self.revision))
        except Exception as error:
            self._refuse(error, name)
            raise VarpiError(f"{self.where}: {name} cannot be downloaded ({type(error).__name__}: {error})") from error

    def _refuse(self, error: Exception, name: str = "") -> None:
        """Raise what the Hub itself said; return when it is the network, whose exceptions differ by version."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            message = "needs permission; accept its terms on the Hub, then `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"the Hub's {self.repo} has no revision {self.revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            message = "no such file or directory here and no such repository on the Hub"
        elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            message = f"the Hub's {self.repo} has no file {name!r}"
        else:
            return
        raise VarpiError(f"{self.where}: {message}") from error

    def _find(self) -> Path | None:
        import huggingface_hub as hub
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(hub.snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            # Recent versions say so when only part of the repository was downloaded, which is all we ever do.
            partial: Any = getattr(error, "snapshot_path", None)
            return Path(partial) if partial else None
