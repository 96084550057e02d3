"""Repositories of the Hugging Face Hub: downloaded into its cache, or found there without a network; and uploaded."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError
from varpi.runtime.files import line

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

    def download(self, names: Sequence[str]) -> Path:
        """The folder that holds these files of the repository, downloaded if need be."""
        import huggingface_hub as hub

        folder = self._cached
        if folder is None:
            patterns = [glob.escape(name) for name in names]
            try:
                folder = Path(hub.snapshot_download(self.repo, revision=self.revision, allow_patterns=patterns))
            except Exception as error:
                self._refuse(error)
                raise VarpiError(f"{self.where}: cannot be downloaded ({type(error).__name__}: {error})") from error
        if absent := [name for name in names if not (folder / name).is_file()]:
            where = "the Hub cannot be reached, and its cache does not hold" if self._cached else "the Hub has no file"
            raise VarpiError(f"{self.where}: {where} {absent[0]!r}")
        return folder

    def _refuse(self, error: Exception) -> None:
        """Raise what the Hub itself said; return when it is the network, whose exceptions differ by version."""
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            message = "needs permission; accept its terms on the Hub, then `hf auth login`"
        elif isinstance(error, errors.RevisionNotFoundError):
            message = f"the Hub's {self.repo} has no revision {self.revision!r}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            message = "no such file or directory here and no such repository on the Hub"
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


def is_cached(repo: str, revision: str | None = None) -> bool:
    """Whether the Hub's cache holds files of a repository. Asks nothing of the network."""
    import huggingface_hub as hub

    try:
        hub.snapshot_download(repo, revision=revision, local_files_only=True)
    except Exception as error:  # of versions that say so when only a part was downloaded, which is all we ever do
        return getattr(error, "snapshot_path", None) is not None
    return True


def check_repository(repo: str) -> None:
    """Raise VarpiError for what cannot be the name of a repository."""
    match = ID.fullmatch(repo)
    if match is None or match["repo"] != repo:
        raise VarpiError(f"{repo}: is not the name of a repository on the Hub, such as me/llamagen-xxl-va-pi")


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder's files in one commit to a model's repository, which is made where there is none; its address.

    Raises VarpiError when there is no permission, or the Hub cannot be reached or refuses.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = hub.HfApi()
    try:
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by varpi push")
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, LocalTokenNotFoundError) or (isinstance(error, HfHubHTTPError) and status in (401, 403)):
            raise VarpiError(
                f"{repo}: the Hub does not permit it; log in with a token that may write: hf auth login"
            ) from error
        raise VarpiError(f"{repo}: could not be uploaded ({line(error)})") from error
    return str(address)
