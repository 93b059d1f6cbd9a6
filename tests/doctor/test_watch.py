"""What is said about the figures of a run while it trains: once, and only of enough preferences."""

from __future__ import annotations

from ds_align.doctor import Watch


def row(accuracy: float = 0.8, **values: float) -> dict[str, float]:
    return {"rewards/accuracies": accuracy, "rewards/chosen": 0.1, "grad_norm": 1.0} | values


def watch(num_steps: int = 100) -> Watch:
    return Watch(num_steps, has_reference=True)


def test_an_accuracy_that_is_too_good_too_early():
    seen = watch()
    assert seen.look(1, row(1.0), 16) == []  # of 16 preferences: chance
    (text,) = seen.look(10, row(1.0), 16)
    assert text.startswith("warning: rewards/accuracies is 1.000 after 10 of 100 steps")
    assert seen.look(10, row(1.0), 16) == []
    late = watch()
    assert late.look(11, row(1.0), 1000) == []
    # (0.97 + 0.99) / 2 is the limit itself.
    even = watch()
    assert even.look(5, row(0.97), 100) == []
    assert even.look(10, row(0.99), 100) == []


def test_an_accuracy_that_stays_at_one_half():
    seen = watch()
    assert seen.look(30, row(0.5), 500) == []
    assert seen.look(31, row(0.5), 99) == []
    (text,) = seen.look(40, row(0.54), 50)  # (49.5 + 27) / 149 = 0.5134
    assert "still 0.513 after 40 of 100 steps" in text
    assert seen.look(50, row(0.5), 500) == []
    assert watch().look(40, row(0.53), 500) == []


def test_a_loss_that_leaps():
    seen = watch()
    for number in range(10):
        assert seen.spike(0.6 + 0.01 * (number % 2)) is None
    # The mean is 0.605: twice that is 1.21; the deviation of 0.005 six times over is far less.
    assert seen.spike(1.2) is None
    text = seen.spike(
        1.4
    )  # of 11 losses with 1.2 among them: mean 0.6591, deviation 0.1711, six of them 1.0264
    assert text is None
    calm = watch()
    for _ in range(10):
        calm.spike(0.5)
    assert calm.spike(0.99) is None
    again = watch()
    for _ in range(10):
        again.spike(0.5)
    assert (
        again.spike(1.01) == "warning: the loss leaps to 1.0100, the mean of the 10 logged before is 0.5000"
    )
    few = watch()
    for _ in range(9):
        few.spike(0.5)
    assert few.spike(100.0) is None  # nine say nothing


def test_a_large_gradient_is_said_once():
    seen = watch()
    assert seen.look(1, row(grad_norm=100.0), 8) == []
    assert len(seen.look(2, row(grad_norm=100.5), 8)) == 1
    assert seen.look(3, row(grad_norm=1e6), 8) == []


def test_a_falling_chosen_reward_is_information():
    falling = row(**{"rewards/chosen": -0.5})
    assert watch().look(30, falling, 8) == []
    (text,) = watch().look(31, falling, 8)
    assert "normal" in text
    assert "warning" not in text
    # Without a reference the reward is a log-prob, which is never above 0.
    assert Watch(100, has_reference=False).look(31, falling, 8) == []


def test_rows_without_the_figures_are_well():
    assert watch().look(50, {}, 500) == []
