"""Hugging Face ids -> files here, through huggingface_hub and `datasets` (the extra `hub`): fetched once, then cached.

    org/name            a model, or a data set's train split       org/name@REVISION    a branch, tag or commit of it
    org/name:SPLIT      a data set's split                         org/name:CONFIG/SPLIT
    hf://org/name       the same, where a folder org/ lies here

A file or folder of that name wins. Weights come as safetensors only: pickle is never fetched, nor is a repository's code.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .extras import needs

SITE = "https://huggingface.co"
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_NAME = re.compile(
    rf"(?P<forced>hf:/{{1,2}})?(?P<repo>{_WORD}/{_WORD})"  # pathlib writes hf:// as hf:/
    r"(?::(?:(?P<config>[\w.-]+)/)?(?P<split>\w+))?(?:@(?P<revision>[\w./-]+))?"
)
# Of a model's folder: configs, tokenizer, templates, weights. Neither subfolders nor Mistral's second copy of the weights.
CONFIG_FILES = ["*.json", "*.jinja", "merges.txt", "vocab.txt"]
WEIGHTS = "*model*.safetensors"
NOT_MODEL_FILES = ["*/*", "consolidated*"]
HOW_TO_CONVERT = (
    'convert it to safetensors where you trust it, with python -c "from transformers import AutoModelForCausalLM as M, '
    "AutoTokenizer as T; M.from_pretrained('{name}').save_pretrained('DIR'); T.from_pretrained('{name}').save_pretrained('DIR')\""
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_hub_name(name: str | Path) -> bool:
    """Whether a name that is no file here has the form of an id. Under a folder that lies here only hf:// makes one."""
    match = _NAME.fullmatch(str(name))
    if match is None or Path(name).exists():
        return False
    return match["forced"] is not None or not Path(match["repo"]).parent.is_dir()


def model_folder(name: str | Path, *, weights: bool = True) -> Path:
    """The folder that `--base` or `--adapter` names: itself, or the snapshot of a Hugging Face id in the cache.

    Without `weights` its configs and tokenizer alone. A path is given back unseen, whether it exists or not.

    Raises ValueError or FileNotFoundError for an id that doesn't
    exist, needs a licence, can't be reached, or has its weights as pickle only.
    """
    if not is_hub_name(name):
        return Path(name)
    match = _parsed(name)
    repo, revision = match["repo"], match["revision"]
    if match["split"]:
        raise ValueError(f"{name}: a model has no split; leave :{match['split']} out")
    with needs("hub", f"{name} is no folder here; fetching it from Hugging Face"):
        import huggingface_hub
    with _explained(name, repo, ""):
        folder = Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*CONFIG_FILES, WEIGHTS] if weights else CONFIG_FILES,
                ignore_patterns=NOT_MODEL_FILES,
            )
        )
    if weights and not list(folder.glob(WEIGHTS)):
        _refuse_pickle(huggingface_hub.HfApi(), folder, repo, revision)
    return folder


def forced_hint(folder: str | Path) -> str:
    """What to add to "does not exist" for a name that could be an id, had not its first part the name of a folder here."""
    match = _NAME.fullmatch(str(folder))
    if match is None or match["forced"] or not Path(match["repo"]).parent.is_dir():
        return ""
    return f"; {Path(match['repo']).parent}/ is a folder here, so for the Hugging Face id write hf://{match['repo']}"


def name_of(folder: str | Path) -> str | None:
    """org/name of a folder in Hugging Face's cache, models--org--name/snapshots/COMMIT; None for other folders."""
    parts = Path(folder).absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)


def dataset_files(name: str | Path) -> list[Path]:
    """The Arrow files of a data set's split in the cache of `datasets`, which fetches and converts what isn't there yet.

    Raises ValueError or FileNotFoundError as `model_folder`, and for a split or config that the data set doesn't have.
    """
    match = _parsed(name)
    with needs("hub", f"{name} is no file or folder here; fetching it from Hugging Face"):
        import datasets
    with _explained(name, match["repo"], "datasets/"):
        data = datasets.load_dataset(
            match["repo"], match["config"], split=match["split"] or "train", revision=match["revision"]
        )
    return [Path(file["filename"]) for file in data.cache_files]


def _parsed(name: str | Path) -> re.Match[str]:
    match = _NAME.fullmatch(str(name))
    assert match is not None, name
    return match


def _refuse_pickle(api: Any, folder: Path, repo: str, revision: str | None) -> None:
    """Raise ValueError for a model without safetensors; says so when its weights are pickled."""
    try:
        names = api.list_repo_files(repo, revision=revision)
    except Exception:  # not reachable: what the cache has
        names = [path.name for path in folder.iterdir()]
    pickled = [name for name in names if name.endswith(PICKLES)]
    if not pickled:
        raise FileNotFoundError(f"{repo} has no safetensors weights; choose another repository or revision (@REVISION)")
    raise ValueError(
        f"{repo} has its weights as pickle only ({pickled[0]}); graft never loads pickle: {HOW_TO_CONVERT.format(name=repo)}"
    )


# Of graft's own code, or of a library that is used wrongly: no advice on the repository would help.
PROGRAMMING_ERRORS = (AttributeError, NameError, TypeError, AssertionError, NotImplementedError)


@contextmanager
def _explained(name: str | Path, repo: str, kind: str) -> Iterator[None]:
    """Within the block what the libraries raise becomes one line that says what to do. `kind` is part of the page's address."""
    from huggingface_hub import errors

    page = f"{SITE}/{kind}{repo}"
    try:
        yield
    except PROGRAMMING_ERRORS:
        raise
    except Exception as error:
        chain = _causes(error)
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if any(isinstance(one, errors.GatedRepoError) for one in chain) or "is a gated" in str(error):
            raise ValueError(
                f"{name} needs its licence accepted: log in and accept it at {page}, then give the token to this machine "
                "with hf auth login"
            ) from None
        if any(isinstance(one, errors.RevisionNotFoundError) for one in chain):
            raise ValueError(f"{name}: no such revision; {page}/tree/main lists branches and tags") from None
        if _is_offline(chain):
            raise FileNotFoundError(
                f"{name} is neither a file or folder here nor in Hugging Face's cache, and the network can't be reached "
                f"({first[:120]}); correct the path, or fetch it where there is a network"
            ) from None
        if any(isinstance(one, errors.RepositoryNotFoundError) for one in chain) or "doesn't exist" in first:
            raise FileNotFoundError(
                f"{name} is neither a file or folder here nor at {page}; check the name, or run hf auth login if it is private"
            ) from None
        raise ValueError(f"{name}: {' '.join(str(error).split())[:400]} ({page})") from None


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and those that it came from."""
    found = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _is_offline(chain: list[BaseException]) -> bool:
    from huggingface_hub import errors

    kinds = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(one, kinds) or "Connect" in type(one).__name__ for one in chain)
