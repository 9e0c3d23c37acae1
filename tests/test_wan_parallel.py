import shutil
from functools import partial

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests import tiny
from tests.forked import fork, needs_fork
from tests.together import CASES, COMPILED, make, make_all
from utils.errors import UserError
from utils.processes import Processes
from wan.parallel import Split, split_of


@pytest.mark.parametrize(
    ("processes", "heads", "guided", "split"),
    [
        (1, 12, True, Split(halves=False, whole=True)),
        (2, 12, True, Split(halves=True, whole=True)),
        (2, 3, True, Split(halves=True, whole=False)),
        (2, 12, False, Split(halves=False, whole=True)),
        (5, 40, True, Split(halves=False, whole=True)),
        (8, 12, True, Split(halves=True, whole=False)),
        (16, 40, True, Split(halves=True, whole=False)),
    ],
)
def test_processes_are_split_by_predictions_first_and_by_heads_then(processes, heads, guided, split):
    assert split_of(processes, heads, guided) == split


@pytest.mark.parametrize(
    ("processes", "heads", "guided", "line"),
    [
        (
            3,
            40,
            True,
            "3 processes: they cannot share the 40 attention heads of this DiT equally, with guidance."
            " Start 1, 2, 4, 5, 8, 10, 16, 20, 40 or 80.",
        ),
        (
            2,
            3,
            False,
            "2 processes: they cannot share the 3 attention heads of this DiT equally, without guidance. Start 1 or 3.",
        ),
    ],
)
def test_a_number_of_processes_that_fits_nothing_is_named_with_those_that_fit(processes, heads, guided, line):
    with pytest.raises(UserError) as error:
        split_of(processes, heads, guided)
    assert str(error.value) == line


# ---------------------------------------------------------------------------------------- against a single process
@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """By number of heads: a folder with tiny models and a start image, and what one process makes of each case."""
    made = {}
    for heads in (3, 4):
        folder = tmp_path_factory.mktemp(f"{heads}-heads")
        for kind in ("vae", "t5", "tokenizer", "clip"):
            shutil.copy(models[kind], folder)
        for kind in ("dit_t2v", "dit_i2v"):
            path = folder / f"{kind}.safetensors"
            tiny.save_file_atomically(tiny.state_dict(kind), path, {"num_heads": str(heads)})
        Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(folder / "start.png")
        made[heads] = folder, {name: make(case, folder, Processes()) for name, case in CASES.items()}
    return made


def assert_same(folder, processes, alone):
    """Compare up to the rounding of products of fewer rows; exactly where each prediction is made by one process."""
    for name, latents in alone.items():
        together = load_file(folder / f"{name}_{processes}.safetensors")
        for i, latent in enumerate(latents):
            error = (together[str(i)] - latent).norm() / latent.norm()
            assert error <= (0 if processes == 2 and name == "odd tokens" and i == 0 else 1e-5), f"{name}, video {i}"


def test_four_processes_that_torchrun_starts_make_what_one_makes(alone, run_cli):
    folder, latents = alone[4]
    launch = "torch.distributed.run --standalone --nproc_per_node 4 -m tests.together"
    result = run_cli("-m", *launch.split(), folder)
    assert result.returncode == 0, result.stderr
    assert "4 processes: two predictions at a time, each on 2, and one that is alone on 4" in result.stderr
    bars = result.stderr.count("denoising:   0%")  # of the first process alone; shown anew around a line of the log
    assert len(CASES) <= bars < 2 * len(CASES) and "\n[" not in result.stderr
    assert_same(folder, 4, latents)


@needs_fork
@pytest.mark.parametrize(
    ("heads", "processes", "how"),
    [
        (4, 2, "two predictions at a time, each on 1, and one that is alone on 2"),
        (3, 2, "two predictions at a time, each on 1, and one that is alone on 1"),
        (3, 3, "each prediction on all of them"),
    ],
)
def test_two_and_three_processes_make_what_one_makes(alone, heads, processes, how):
    folder, latents = alone[heads]
    if heads % processes:
        latents = {name: latents[name] for name in latents if name != "unguided"}
    codes, said = fork(partial(make_all, folder, latents), folder, processes)
    assert codes == [0] * processes, said
    assert f"{processes} processes: {how}" in said
    assert_same(folder, processes, latents)


@needs_fork
def test_processes_that_share_tokens_can_compile_what_is_between_their_exchanges(alone):
    folder, latents = alone[4]
    codes, said = fork(partial(make_all, folder, COMPILED), folder, 2)
    assert codes == [0, 0], said
    assert_same(folder, 2, {"compiled": latents["guided"]})
