"""Deaths around the border of two fits: a party that begins its program again passes by what both have done."""

import pytest

from tests.faults.runs import OPTIMIZERS, TRAIN, Death, Federation, program, weights, write_data

FIT = "model.fit(efl.procedure_fn.train(max_step=22)"
# At step 12 three checkpoints are written, of two files each: in the first fit, at its end, as the second one begins.
WRITTEN = {f"while-it-writes-file-{n}-of-step-12": Death("saving", "train", 12, time=n) for n in range(1, 7)}
PLACES = {
    **WRITTEN,
    "between": Death("between", "train", 12),
    "in-the-first-step-of-the-second": Death("within", "train", 13),
    "after-the-last-step": Death("after", "train", 22),
}
VICTIMS = (["leader"], ["follower"], ["leader", "follower"])
SAMPLE = {("between", "follower"), ("while-it-writes-file-5-of-step-12", "leader"), ("between", "leader-follower")}
CASES = [(place, victims, keep) for place in PLACES for victims in VICTIMS for keep in (1, 5)]


def two_fits(keep):
    script = program(TRAIN, OPTIMIZERS["momentum"])
    (fit,) = [line for line in script.splitlines() if line.startswith(FIT)]
    fit = fit.replace(", log_step", f", keep_checkpoints={keep}, log_step")
    steps = [fit.replace("max_step=22", f"max_step={count}") for count in (12, 10)]
    between = 'die("between", "train", model.steps_trained)'
    return "\n".join(
        "\n".join([steps[0], between, steps[1]]) if line.startswith(FIT) else line for line in script.splitlines()
    )


@pytest.mark.parametrize(
    ("place", "victims", "keep"),
    [
        pytest.param(
            *case,
            marks=() if (case[0], "-".join(case[1])) in SAMPLE and case[2] == 1 else pytest.mark.full,
            id=f"{case[0]}-{'-'.join(case[1])}-keep-{case[2]}",
        )
        for case in CASES
    ],
)
def test_death_around_the_border_of_two_fits(tmp_path, undisturbed, tally, place, victims, keep):
    write_data(tmp_path)
    federation = Federation(tmp_path, two_fits(keep))
    federation.run({role: [PLACES[place]] for role in victims})
    assert federation.starts == {role: 1 + (role in victims) for role in ("leader", "follower")}, federation.told()
    # 12 steps and 10 are the 22 of one fit: weights, readers and counters go on.
    expected, _ = undisturbed(TRAIN, OPTIMIZERS["momentum"])
    tally.compare("kill -9 around the border of two fits", len(victims), weights(tmp_path), expected)
