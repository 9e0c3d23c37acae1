"""--interactive: prompts typed one after the other, with models that stay loaded in between."""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from modules.clips import count_frames
from modules.generation import generate
from modules.generation_options import Loaded, Models, SamplingOptions
from modules.generation_plan import check_generation, check_request, plan_results
from modules.outputs import OutputOptions, check_outputs, names_a_file
from modules.prompts import PromptOptions, Request, line_options, make_request, parse_inference_prompt
from utils.devices import release_memory
from utils.errors import UserError
from wan.auto_swap import ran_out_of_memory
from wan.memory import Step as MemoryStep
from wan.model import WanModel
from wan.pair import DitPair, fetch, park, parking_device
from wan.vae import WanVAE, check_vae

logger = logging.getLogger(__name__)

HELP = "a prompt and behind it --w --h --f --d --s --g --fs --n --i --ei --cn; Ctrl-C cancels a video, Ctrl-D ends"


class Cancelled(KeyboardInterrupt):
    """Ctrl-C between two steps, where all models are whole."""


class Interrupts:
    """Ctrl-C as a wish that is granted at the next step; a second one at once."""

    def __init__(self):
        self.asked = False

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """While it is entered, Ctrl-C makes check() raise."""
        self.asked = False
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _hear(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.info("ends after this step; Ctrl-C once more ends the program")

    def check(self) -> None:
        if self.asked:
            raise Cancelled

    def between(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a look at whether to go on before it is called."""

        def checked(*args: Any, **named: Any) -> Any:
            self.check()
            return function(*args, **named)

        return checked


@dataclass(frozen=True, kw_only=True)
class KeptModels(Models):
    """Models each of which is loaded once.

    The encoders wait in main memory while others run. The DiT stays on the device as long as they find room beside it.
    """

    interrupts: Interrupts
    loaded: dict[str, Any] = field(default_factory=dict)
    parked: set[str] = field(default_factory=set)

    def kept(self, name: str, load: Callable[[], Loaded]) -> Loaded:
        for other in ("t5", "clip"):
            if other != name and other in self.loaded:
                self._wait(other)
        release_memory(self.device)
        if name not in self.loaded:
            self.loaded[name] = self._with_room(load)
        elif name in self.parked:
            self._with_room(partial(self._come, name))
        return self.loaded[name]

    def load_dit(self, steps: Sequence[MemoryStep] = ()) -> WanModel | DitPair:
        def load() -> WanModel | DitPair:
            dit = super(KeptModels, self).load_dit(steps)
            asked = "chosen" if isinstance(dit, DitPair) else "velocities"  # once a step at most
            setattr(dit, asked, self.interrupts.between(getattr(dit, asked)))
            return dit

        return self.kept("dit", load)

    def load_vae(self) -> WanVAE:
        def load() -> WanVAE:
            vae = super(KeptModels, self).load_vae()
            vae.decode_chunks = self._interrupted_chunks(vae.decode_chunks)
            return vae

        return self.kept("vae", load).to(self.device)

    def _interrupted_chunks(self, chunks: Callable[..., Iterator]) -> Callable[..., Iterator]:
        def checked(*args: Any) -> Iterator:
            for chunk in chunks(*args):
                self.interrupts.check()
                yield chunk

        return checked

    def _with_room(self, load: Callable[[], Loaded]) -> Loaded:
        """Return what load() does; where memory does not suffice, once more while the DiT waits in main memory."""
        try:
            return load()
        except RuntimeError as error:
            if not ran_out_of_memory(error) or "dit" not in self.loaded or "dit" in self.parked:
                raise
        self._wait("dit")
        release_memory(self.device)
        return load()

    def _wait(self, name: str) -> None:
        """Move a model to main memory."""
        if name in self.parked:
            return
        if name == "dit":
            for model in _on_device(self.loaded[name]):
                park(model, parking_device(self.device, self.swap))
        elif not _swapped(self.loaded[name]):
            self.loaded[name].model.to("cpu")
        self.parked.add(name)

    def _come(self, name: str) -> None:
        """Move a model back to the device."""
        if name == "dit":
            for model in _on_device(self.loaded[name]):
                fetch(model, parking_device(self.device, self.swap))
        elif not _swapped(self.loaded[name]):
            self.loaded[name].model.to(self.device)
        self.parked.discard(name)


def _on_device(dit: WanModel | DitPair) -> list[WanModel]:
    """Return the models of a DiT that are on the device; of a pair without place for both, that in use."""
    if not isinstance(dit, DitPair):
        return [dit]
    return [dit.current] if dit.offload else dit.models


def _swapped(encoder: Any) -> bool:
    """Return whether an encoder's blocks are in main memory anyway."""
    auto = getattr(encoder, "auto", None)
    return auto is not None and bool(auto.ring.numbers)


def converse(
    prompts: PromptOptions,
    models: Models,
    sampling: SamplingOptions,
    outputs: OutputOptions,
    read: Callable[[], str] | None = None,
) -> None:
    """Make a video of each line until there is no more; a line that cannot be made costs no other.

    read: returns the next line, raises EOFError at the end and KeyboardInterrupt for a line that is given up.
    """
    _check_session(prompts, models, sampling, outputs)
    read = read or line_reader()
    interrupts = Interrupts()
    kept = KeptModels(**vars(models), interrupts=interrupts)
    logger.info("%s", HELP)
    while True:
        try:
            line = read()
        except EOFError:
            return
        except KeyboardInterrupt:
            logger.info("Ctrl-D ends")
            continue
        if not line.strip() or line.strip().startswith("#"):
            continue
        try:
            request = _request_of(line, prompts, models, sampling)
            results = plan_results([request], models, sampling, outputs)
            with interrupts.awaited():
                generate([request], kept, sampling, results, outputs)
        except UserError as error:
            logger.error("error: %s", error)
        except Cancelled:
            logger.warning("cancelled")


def _check_session(prompts: PromptOptions, models: Models, sampling: SamplingOptions, outputs: OutputOptions) -> None:
    if prompts.from_file is not None:
        raise UserError("--interactive: has no use for --from_file", "leave one of them out")
    if prompts.skip_existing:
        raise UserError("--skip_existing: is for --from_file", "leave it out")
    if prompts.prompt is not None:
        logger.warning("--prompt: ignored with --interactive")
    if outputs.save_path is not None and names_a_file(outputs.save_path):
        raise UserError(
            f"--save_path {outputs.save_path}: names one file, --interactive makes several", "name a folder"
        )
    check_outputs(outputs, 2)
    check_generation([], models, sampling, outputs)
    if prompts.video_path is not None:
        count_frames(prompts.video_path, "--video_path", models.config.frames)
        check_vae(models.vae.vae)


def _request_of(line: str, prompts: PromptOptions, models: Models, sampling: SamplingOptions) -> Request:
    request = make_request(line_options(parse_inference_prompt(line), prompts), models.config)
    check_request(request, models.config, sampling)
    return request


def line_reader() -> Callable[[], str]:
    """Return what reads lines from the terminal, with a history of them; or from whatever else stdin is."""
    if not sys.stdin.isatty():
        return partial(input, "")
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() a history
        return partial(input, "> ")
    session = PromptSession()
    return partial(session.prompt, "> ")
