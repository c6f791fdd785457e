import pytest

from lora_jax.cli.main import main

from chat_rows import ROWS, write_rows


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Compiled programs of the tests don't go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run on the tiny model, with an effect that can be seen."""
    folder = tmp_path_factory.mktemp("runs")
    data, heldout = write_rows(folder / "a.jsonl"), write_rows(folder / "b.jsonl", ROWS[:1])
    words = ["train", "--model", "tiny", "--data", data, "--heldout", heldout, "--out"]
    words += [folder / "run", "--rank", "8", "--epochs", "40", "--batch-size", "1"]
    words += ["--max-length", "128", "--learning-rate", "0.03", "--max-new-tokens", "12"]
    assert main(list(map(str, words))) == 0
    return folder / "run"
