"""What is planned is what a run does, at the very steps, also where it goes on."""

import pytest

from modules.milestones import FILE, SAMPLE, STATE, VALIDATION, Ahead, milestones
from modules.run_log import read_log
from tests.test_modules_trainer import trainer  # noqa: F401


def done(run) -> list[tuple[int, str]]:
    found = []
    for line in read_log(run.record.log.path):
        if line["kind"] == "save":
            found.append((line["step"], STATE if line["file"].endswith("-state") else FILE))
        elif line["kind"] in (SAMPLE, VALIDATION):
            found.append((line["step"], line["kind"]))
    return sorted(found)


def no_samples(self, dit, trained, step, epoch=None):
    self._last_step = step
    return [self.plan.folder / "none.png"]


@pytest.mark.parametrize(
    "options",
    [
        "--max_train_steps 9 --save_every_n_steps 4 --save_state --sample_every_n_steps 7 --sample_every_n_epochs 1",
        "--max_train_epochs 3 --save_every_n_epochs 1 --gradient_accumulation_steps 3 --save_state_on_train_end "
        "--sample_every_n_epochs 2 --sample_at_first",
        "--max_train_steps 16 --save_every_n_steps 5 --save_every_n_epochs 1 --save_state",
        "--max_train_steps 9 --validation_split 0.2 --validate_every_n_steps 3 --validate_every_n_epochs 1 "
        "--save_every_n_steps 4 --save_state",
    ],
)
def test_what_is_planned_is_done_at_those_steps(trainer, models, tmp_path, monkeypatch, options):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("a cat --w 32 --h 32 --f 1 --s 1 --l 1")
    encoders = f"--vae {models['vae']} --t5 {models['t5']} --t5_tokenizer {models['tokenizer']}"
    samples = f"--sample_prompts {tmp_path / 'prompts.txt'} {encoders}" if "sample" in options else ""
    monkeypatch.setattr("modules.samples.Sampler.make", no_samples)
    monkeypatch.setattr("modules.run_report.Reporter.write", lambda self: None)
    run = trainer(f"{options} {samples}")
    planned = milestones(run.plan)
    run.run()
    assert sorted((each.step, each.kind) for each in planned) == done(run)
    folder = run.plan.options.saving.output_dir
    for state in sorted(folder.glob("name-*-state")):
        again = trainer(f"{options} {samples} --resume {state} --output_dir {folder}").plan
        step = again.state.progress.step
        assert [each for each in milestones(again) if each.step > step] == [e for e in planned if e.step > step]
        left = Ahead(planned).after(step)
        assert left == {kind: sum(e.kind == kind and e.step > step for e in planned) for kind in left}
