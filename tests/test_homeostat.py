"""The Homeostat: against simple-pid sample by sample, and on a simulated plant against the acceptance figures.

The plant is sigma(lambda) = s0 / (1 + lambda / lambda0), reached with a first-order lag tau and a dead time, measured with
multiplicative noise: a stand-in for the heads, used to test the controller only. Times are in optimiser steps.
"""

import argparse
import math
import random
import re
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from calibration import record
from simple_pid import PID

import janus_adaptive as janus

TARGET = 0.0035


def run_loop(steps=6000, k_p=0.9, k_i=0.003, beta=0.9, tau=300.0, dead=10, noise=0.08, s0=0.03, gain=1.0, law="log", warmup=1500,
             start=1.0, limits=(1e-5, 1e4), setpoint=None, load=None, anti_windup="tracking", seed=0):  # fmt: skip
    """Simulates the closed loop -> true sigma, lambda and `saturated`, one value a step."""
    rng, dt = random.Random(seed), 10
    pid = janus.Homeostat(TARGET, k_p, k_i, 0.0, law, dt, beta, limits, anti_windup)
    log_sigma, queue, lam, trace = math.log(s0), deque([0.0] * dead), 0.0, []
    for t in range(steps):
        queue.append(lam)
        level = s0 / (1 + queue.popleft() / 1.0) ** gain * (load(t) if load else 1.0)
        log_sigma += (math.log(level) - log_sigma) / tau
        if setpoint and t == setpoint[0]:
            pid.setpoint = math.log(setpoint[1]) if law == "log" else setpoint[1]
        if t % dt == 0:
            sample = math.exp(log_sigma) * math.exp(noise * rng.gauss(0, 1))
            if t < warmup:
                pid.measure(sample)
                lam = start * t / warmup
            elif t == warmup:
                pid.measure(sample)
                pid.hand_over(lam)
            else:
                lam = pid.update(sample)
        trace.append((math.exp(log_sigma), lam, pid.saturated))
    return tuple(np.array(x) for x in zip(*trace, strict=True))


def settle_time(sigma, target=TARGET, tolerance=0.10):
    """Steps after which sigma stays within the tolerance of the target."""
    outside = np.flatnonzero(abs(sigma / target - 1) > tolerance)
    return 0 if not len(outside) else outside[-1] + 1


def test_linear_law_equals_simple_pid():
    rng = random.Random(0)
    for k_p, k_i, k_d in [(2.0, 0.3, 0.7), (0.5, 0.0, 0.0), (0.0, 1.1, 0.0), (5.0, 0.01, 3.0)]:
        ours = janus.Homeostat(0.4, k_p, k_i, k_d, "linear", 1.0, 0.0, (0.0, 1.0), "clamp")
        theirs = PID(-k_p, -k_i, -k_d, setpoint=0.4, sample_time=None, output_limits=(0.0, 1.0))
        saturated = 0
        for _ in range(10_000):
            sample = rng.uniform(0, 1)
            assert math.isclose(ours.update(sample), theirs(sample, dt=1), abs_tol=1e-12)
            saturated += ours.saturated
        assert 0 < saturated < 10_000 or k_p < 1  # with a large k_p both regimes are met


def test_golden_values():
    pid = janus.Homeostat(0.5, 2.0, 0.1, 3.0, "linear", 10.0, 0.0, (-100.0, 100.0), "none")
    assert pid.update(0.7) == pytest.approx(
        2 * 0.2 + 0.1 * 0.2 * 10
    )  # no derivative kick on the first sample
    assert (pid.p, pid.i, pid.d) == pytest.approx((0.4, 0.2, 0.0))
    pid.update(0.6)
    assert (pid.p, pid.i, pid.d) == pytest.approx((0.2, 0.3, 3 * -0.01))


def test_derivative_is_silent_on_a_setpoint_step():
    pid = janus.Homeostat(0.5, 0.0, 0.0, 5.0, "linear", 1.0, 0.0, (-10.0, 10.0))
    pid.update(0.6)
    pid.setpoint = 0.1
    assert pid.update(0.6) == 0.0


def test_direction_in_both_laws():
    for law in ("log", "linear"):
        up, down = (janus.Homeostat(TARGET, 0.9, 0.003, 0.0, law) for _ in range(2))
        for pid, sigma in ((up, 2 * TARGET), (down, TARGET / 2)):
            pid.measure(TARGET)
            pid.hand_over(0.1)
            pid.update(sigma)
        assert up.value > 0.1 > down.value


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_unusable_samples_are_held(bad):
    pid = janus.Homeostat(TARGET, 0.9, 0.003, 0.1)
    pid.update(0.01)
    before = vars(pid).copy()
    assert pid.update(bad) == before["value"]
    assert vars(pid) == before | {"held": 1}


def test_random_walk_keeps_lambda_in_its_limits():
    rng, pid = random.Random(1), janus.Homeostat(TARGET, 0.9, 0.01, 0.5, limits=(1e-3, 10.0))
    log_sigma, seen = math.log(TARGET), []
    for _ in range(5000):
        log_sigma += rng.gauss(0, 0.2)
        seen.append(pid.update(math.exp(log_sigma)))
    assert min(seen) == pytest.approx(1e-3) and max(seen) == pytest.approx(10.0)


def test_hand_over_is_bumpless():
    for law in ("log", "linear"):
        pid = janus.Homeostat(TARGET, 0.9, 0.003, 0.0, law)
        pid.measure(0.02)
        pid.hand_over(0.7)
        assert pid.update(0.02) == pytest.approx(0.7, rel=0.10)


def test_state_is_python_floats():
    """heads.md's trap: an integral kept in bfloat16 would not move by a thousand small steps; ours must."""
    pid = janus.Homeostat(TARGET, 0.0, 1.0, 0.0, "linear", 1.0, 0.0, (0.0, 1.0))
    pid.hand_over(0.05)
    for _ in range(1000):
        pid.update(TARGET + 3.5e-5)
    assert pid.value == pytest.approx(0.05 + 1000 * 3.5e-5, rel=1e-9)


def test_settles_without_undershoot_and_stays():
    sigma, lam, _ = run_loop()
    after = sigma[1500:]
    assert settle_time(after) <= 5 * (300 + 10)
    assert after.min() / TARGET >= 0.85
    tail = sigma[-len(after) // 4 :]
    assert abs(tail.mean() / TARGET - 1) <= 0.02
    assert (abs(tail / TARGET - 1) <= 0.10).mean() >= 0.90
    assert abs(lam[1511] / lam[1500] - 1) <= 0.10  # the first closed-loop output


def test_setpoint_step():
    sigma, _, _ = run_loop(steps=9000, setpoint=(6000, 0.005))
    after = sigma[6000:]
    assert settle_time(after, 0.005) <= 3 * 300
    assert after.max() / 0.005 <= 1.15


@pytest.mark.parametrize("gain", [1 / 3, 1.0, 3.0])
@pytest.mark.parametrize("tau", [100.0, 300.0, 900.0])
def test_gain_robust(gain, tau):
    """Stable, without a limit cycle, although the plant's gain or lag is three times off; log law."""
    sigma, _, _ = run_loop(
        steps=16000, tau=tau, gain=gain, s0=TARGET * 8.57**gain if gain < 1 else 0.03, start=1.0
    )
    tail = sigma[-3000:]
    assert tail.std() / tail.mean() <= 0.05
    assert abs(tail.mean() / TARGET - 1) <= 0.05


def test_saturation_recovery_needs_the_anti_windup():
    """The heads become 30 times more alike for 3,000 steps, beyond what lambda_max can hold."""

    def leaves_after(mode):
        _, _, saturated = run_loop(
            steps=13000,
            limits=(1e-5, 20.0),
            load=lambda t: 30.0 if 5000 <= t < 8000 else 1.0,
            anti_windup=mode,
        )
        assert saturated[7500]
        free = np.flatnonzero(~saturated[8000:])
        return free[0] if len(free) else 5000

    assert leaves_after("tracking") <= 2 * 300
    assert leaves_after("clamp") <= 2 * 300
    assert leaves_after("none") >= 5 * leaves_after("tracking")


def test_the_tracking_time_is_that_of_the_integral():
    """While u is beyond the limit, I nears what the limit allows by dt / T_t of the way at each sample."""
    pid = janus.Homeostat(1.0, 2.0, 0.1, 0.0, "linear", 5.0, 0.0, (0.0, 3.0))
    assert pid.tracking_time == 20  # k_p / k_i
    pid.i = 1.0
    pid.update(3.0)  # P 4, I 1 + 0.1 * 2 * 5 = 2: u = 6, three too many
    assert pid.i == pytest.approx(2 - 3 * 5 / 20) and pid.value == 3.0 and pid.saturated


def test_hold_stands_still_even_at_a_limit():
    pid = janus.Homeostat(TARGET, 0.9, 0.003, 0.0, limits=(1e-3, 10.0))
    pid.measure(TARGET)
    pid.hand_over(9.0)
    before = pid.i
    for _ in range(50):
        pid.update(100 * TARGET, integrate=False)
    assert pid.saturated and pid.i == before


def test_one_wild_sample_hardly_moves_the_loop():
    """22 times the setpoint, unfiltered, at lambda 8: afterwards lambda is what the rest of the samples ask for."""
    pid = janus.Homeostat(TARGET, 4.0, 0.1, 0.0, dt=5.0)
    pid.measure(TARGET)
    pid.hand_over(8.0)
    pid.update(22 * TARGET)
    assert pid.saturated
    for _ in range(3):
        pid.update(TARGET)
    assert 8 / 4 < pid.value < 8 * 4  # by exact tracking it fell to .04, 200 times


def test_terms_add_up_to_what_is_used():
    pressure = janus.Pressure(args(pressure_warmup=50, lambda_start=2.0))
    rng = random.Random(3)
    for step in range(10, 301, 10):
        loop = pressure.loops[0]
        if pressure.phase == "auto":
            u = loop.p + loop.i + loop.d
            assert loop.saturated or math.exp(u) == pytest.approx(pressure.weights(step)[0])
        pressure.observe(step, [0.0035 * math.exp(rng.gauss(0, 0.3))] * 12, 1.0)
    assert pressure.phase == "auto" and not loop.saturated


def demo_arguments():
    """The arguments that `make demo` trains the adaptive arm with."""
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    value = re.search(r"^SETPOINT \?= (\S+)$", makefile, re.M)[1]
    flags = [re.search(rf"^{name} +\?= (.+)$", makefile, re.M)[1] for name in ("DEMO", "TRAIN")]
    return janus.parse_args(" ".join(flags).replace("$(SETPOINT)", value).split())


def simulate_demo(lag, gain, noise, seed):
    """The demo's own Pressure on a plant -> share of filtered samples within 10 % after the first one within it.

    ln sigma follows ln(3.4 target / (1 + lambda / l0)^gain) with a lag (steps) and a dead time of one step. From step 200
    on l0 falls by .3 % a step, as it does in training: the same sigma takes a third of the pressure at the end. Each step
    is measured with `noise` (sd of ln sigma), and a sample is the root mean square over its steps, which the noise makes
    larger by exp(noise^2).
    """
    demo = demo_arguments()
    pressure, rng = janus.Pressure(demo), random.Random(seed)
    target = math.log(demo.target_sigma)
    log_sigma, lam, steps, filtered = target + math.log(3.4), 0.0, [], []
    for step in range(1, demo.steps + 1):
        l0 = 3 * math.exp(-0.003 * max(0, step - 200))
        level = target + math.log(3.4) - gain * math.log1p(lam / l0)
        log_sigma += (level - log_sigma) / lag
        lam = pressure.weights(step)[0]
        steps.append(math.exp(2 * (log_sigma + noise * rng.gauss(0, 1))))
        if step % demo.control_interval == 0:
            sample = math.sqrt(np.mean(steps[-demo.sample_steps :]))
            pressure.observe(step, [sample] * demo.n_layers, 1.0)
            if pressure.phase == "auto":
                filtered.append(pressure.loops[0].filtered - target)
    inside = np.abs(np.expm1(filtered)) <= 0.1
    return inside[inside.argmax() :].mean() if inside.any() else 0.0


@pytest.mark.parametrize("lag", [2, 10, 30, 60])
@pytest.mark.parametrize("gain", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("noise", [0.1, 0.2])
def test_the_demo_loop_holds_on_plants_it_was_not_tuned_for(lag, gain, noise):
    shares = [simulate_demo(lag, gain, noise, seed) for seed in range(8)]
    record(
        "share within 10 %, demo loop",
        f"lag {lag} gain {gain} noise {noise}",
        share=np.mean(shares),
    )
    assert np.mean(shares) >= 0.9


def test_pressure_relaxes_to_the_floor():
    _, lam, _ = run_loop(steps=9000, s0=0.001)
    assert lam[-1] == pytest.approx(1e-5)


def args(**changes):
    base = janus.parse_args(["--preset", "smoke", "--steps", "400"])
    return argparse.Namespace(**(vars(base) | changes))


def test_the_arms():
    assert janus.Pressure(args(pressure="control")).weights(5) == [0.0]
    assert janus.Pressure(args(pressure="constant:0.25")).weights(5) == [0.25]
    adaptive = janus.Pressure(args(pressure_warmup=100, lambda_start=2.0))
    assert adaptive.weights(50) == [1.0] and adaptive.phase == "warmup"
    for step in range(10, 101, 10):
        adaptive.observe(step, [0.02] * 12, 1.0)
    assert adaptive.phase == "auto" and adaptive.weights(101) == [2.0]
    adaptive.observe(110, [0.02] * 12, 1.0)
    assert adaptive.weights(111)[0] > 2.0  # sigma above the setpoint: more pressure
    integral = adaptive.loops[0].i
    adaptive.observe(400, [0.02] * 12, 0.1)
    assert adaptive.phase == "hold" and adaptive.loops[0].i == integral


def test_per_layer_loops_are_independent():
    p = janus.Pressure(args(pressure_warmup=10, per_layer=True))
    for step in (10, 20, 30):
        p.observe(step, [0.02] * 6 + [0.001] * 6, 1.0)
    w = p.weights(31)
    assert len(w) == 12 and min(w[:6]) > 1.0 > max(w[6:])


def test_state_round_trip_continues_bit_for_bit():
    rng = random.Random(0)
    samples = [[0.0035 * math.exp(rng.gauss(0, 0.5))] * 12 for _ in range(40)]
    whole, first, second = (janus.Pressure(args(pressure_warmup=50)) for _ in range(3))
    for i, s in enumerate(samples):
        whole.observe(10 * i, s, 1.0)
        if i < 20:
            first.observe(10 * i, s, 1.0)
    second.load_state_dict(first.state_dict())
    for i, s in enumerate(samples[20:], 20):
        second.observe(10 * i, s, 1.0)
    assert second.state_dict() == whole.state_dict() and second.weights(999) == whole.weights(999)


def test_replay_gives_the_logged_lambda(tmp_path):
    csv = tmp_path / "telemetry.csv"
    csv.write_text("step,lambda,sigma_z,loss,val_loss\n10,0.5,0.1,1,\n20,0.7,0.1,1,\n")
    p = janus.Pressure(args(pressure=f"replay:{csv}"))
    assert [p.weights(s)[0] for s in (1, 10, 11, 20, 99)] == [0.5, 0.5, 0.7, 0.7, 0.7]


def test_without_an_integral_there_is_no_tracking():
    """The limit cuts the output off, and moves nothing: P alone decides the next one."""
    pid = janus.Homeostat(0.1, 10, 0, 0, law="linear", dt=1, limits=(0, 1))
    outputs = [pid.update(0.1 + error) for error in (0.5, 0.5, 0.05, 0.05)]
    assert outputs == pytest.approx([1, 1, 0.5, 0.5])
    assert pid.i == 0


def listing_of_astrom_and_murray(samples, target, k, k_i, tracking_time, low, high, dt):
    """PI control with back-calculation, as Astrom & Murray (2008, section 10.5) list it -> its outputs.

    v = k e + I is limited to u, and only then I += k_i e dt + (u - v) dt / T_t. Here e is above 0 where sigma is too high.
    """
    integral, outputs = 0.0, []
    for sample in samples:
        error = sample - target
        v = k * error + integral
        u = low if v < low else high if v > high else v
        integral = integral + k_i * error * dt + (u - v) * dt / tracking_time
        outputs.append(u)
    return outputs


@pytest.mark.parametrize("noise", [0.02, 0.2])
@pytest.mark.parametrize("mean", [0.06, 0.1, 0.3])
def test_pi_at_the_edge_of_saturation_equals_the_textbook(noise, mean):
    """Noisy samples that push u over both limits and back. Ours takes the sample into I before P acts, so its listing has
    k_i dt more gain on the error; both are the same controller."""
    rng = np.random.default_rng(7)
    samples = 0.1 + mean * np.sin(np.arange(4000) / 150) + noise * rng.standard_normal(4000)
    k_p, k_i, dt = 4.0, 0.02, 5.0
    pid = janus.Homeostat(0.1, k_p, k_i, 0, law="linear", dt=dt, limits=(0, 1))
    ours = np.array([pid.update(sample) for sample in samples])
    k = k_p + k_i * dt
    theirs = listing_of_astrom_and_murray(samples, 0.1, k, k_i, k_p / k_i, 0, 1, dt)
    assert ours == pytest.approx(np.array(theirs), abs=1e-12)
    assert 0.02 < np.mean((ours == 0) | (ours == 1)) < 0.98  # the edge is met, and left


def back_calculation_in_continuous_time(noise, k_p, k_i, tracking_time, high, dt, finer=50):
    """The same loop as a differential equation, in steps of dt / finer -> lambda at every sample.

    dI/dt = k_i e + (u - v) / T_t, and the plant dsigma/dt = (.3 - .2 lambda - sigma) / tau; e is measured with `noise`,
    a value a sample. Nothing of the script is used.
    """
    sigma, integral, outputs = 0.2, 0.0, []
    h = dt / finer
    for measured in noise:
        for _ in range(finer):
            error = sigma + measured - 0.1
            v = k_p * error + integral
            u = min(max(v, 0.0), high)
            integral += h * (k_i * error + (u - v) / tracking_time)
            sigma += h * (0.3 - 0.2 * u - sigma) / 200.0
        outputs.append(u)
    return np.array(outputs)


def sampled_loop(noise, k_p, k_i, high, dt):
    """The same plant under the script's Homeostat, which acts once in dt."""
    pid = janus.Homeostat(0.1, k_p, k_i, 0, law="linear", dt=dt, limits=(0.0, high))
    sigma, outputs = 0.2, []
    for measured in noise:
        outputs.append(pid.update(sigma + measured))
        sigma += dt * (0.3 - 0.2 * outputs[-1] - sigma) / 200.0
    return np.array(outputs)


@pytest.mark.parametrize("high", [0.95, 1.05, 1.3])
def test_a_noisy_loop_near_its_limit_does_what_the_differential_equation_does(high):
    """The setpoint needs lambda = 1: below, just above and well above it. By giving the whole excess back in one sample
    (T_t = dt) noise would push I down at every peak: lambda would stay below what the equation says."""
    noise = 0.03 * np.random.default_rng(3).standard_normal(4000)
    k_p, k_i, dt = 6.0, 0.05, 2.0
    ours = sampled_loop(noise, k_p, k_i, high, dt)[1000:]
    right = back_calculation_in_continuous_time(noise, k_p, k_i, k_p / k_i, high, dt)[1000:]
    at_once = back_calculation_in_continuous_time(noise, k_p, k_i, dt, high, dt)[1000:]
    assert ours.mean() == pytest.approx(right.mean(), abs=0.01)
    assert ours.std() == pytest.approx(right.std(), abs=0.01)
    assert np.mean(ours == high) == pytest.approx(np.mean(right == high), abs=0.02)
    assert right.mean() - at_once.mean() > 0.02  # the test can tell the two apart
