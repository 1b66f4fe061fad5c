"""Every quantity written out from its formula, in plain NumPy: nothing shared with the package.

`exact` evaluates the same lines on mpmath numbers, for temperatures and scales where floats give out.
"""

from itertools import pairwise

import mpmath
import numpy as np

EPS = 2.0**-52

# The error field that covers each number per prompt, or those whose sum does.
COVER = {
    "gap": ["gap_error"],
    "delta1": ["model_error"],
    "delta2": ["gap_error"],
    "shift": ["shift_error"],
    "ceiling": ["model_error", "shift_error"],
    "value_gap": ["model_error", "prompter_error"],
    "own_rise": ["rise_error"],
    "own_fall": ["fall_error"],
    "tv_model": ["tv_model_error"],
    "overlap_model": ["tv_model_error"],
    "tv_shift": ["tv_shift_error"],
    "tv_barycentre": ["tv_shift_error"],
    "tv_induced": ["tv_rho_error"],
    "tv_prompter": ["tv_rho_error"],
    "law_model": ["law_error"],
    "law_shift": ["law_error"],
    "law_induced": ["law_error"],
    "model_kl": ["model_error"],
    "model_jeffreys": ["model_error"],
    "prompter_kl": ["prompter_error"],
    "prompter_jeffreys": ["prompter_error"],
    "prompter_gain": ["prompter_error"],
    "induced_to_star": ["induced_error"],
    "induced_to_model": ["induced_error"],
    "kl_to_star": ["rho_error"],
    "kl_from_star": ["rho_error"],
    "kl_to_reference": ["rho_error"],
    "kl_from_reference": ["rho_error"],
    "kl_excess": ["excess_error"],
    "shortfall": ["rho_error"],
    # Levels: a common offset is rounded too.
    "value": ["prompter_error"],
    "optimum": ["model_error"],
    "original": ["gap_error"],
    "reference": ["gap_error"],
    "achieved": ["gap_error"],
}


def oracle(p, prior, frozen, own, reward, beta, lam, prompter=None, exp=np.exp, log=np.log):
    """Scalars and per-prompt lists, from the definitions. Floats, or object arrays of mpmath numbers."""
    xs, ks, ys = range(len(p)), range(len(frozen)), range(len(frozen[0]))

    def kl(a, b):
        return sum((s * log(s / t) for s, t in zip(a, b, strict=True) if s > 0), start=0 * a[0])

    def tv(a, b):
        return sum(abs(s - t) for s, t in zip(a, b, strict=True)) / 2

    def tanh(a):
        return (1 - exp(-2 * a)) / (1 + exp(-2 * a))

    def two_point(var, rise):
        """σ²(e^z − 1)/(M + (σ²/M) e^z), z = (M + σ²/M)/β, with both sides divided by e^z."""
        if rise <= 0:
            return 0 * rise
        small = exp(-(rise + var / rise) / beta)
        return var * (1 - small) / (rise * small + var / rise)

    def wasserstein(a, b, values):
        """∫ |F_a(t) − F_b(t)| dt of the laws of the values, from one value to the next."""
        steps = sorted(set(values))
        return (
            sum(
                (abs(sum(s - t for s, t, v in zip(a, b, values, strict=True) if v <= low)) * (high - low))
                for low, high in pairwise(steps)
            )
            + 0 * a[0]
        )

    out = {key: [] for key in ("log_z", "log_z_star", "rho", "pi", "span")}
    sums: dict = {}
    for x in xs:
        r = [sum(frozen[k][y] * reward[x][y] for y in ys) for k in ks]
        pi_f = frozen[own[x]]
        z_star = sum(pi_f[y] * exp(reward[x][y] / beta) for y in ys)
        pi = [pi_f[y] * exp(reward[x][y] / beta) / z_star for y in ys]
        z = sum(prior[x][k] * exp(r[k] / lam) for k in ks)
        star = [prior[x][k] * exp(r[k] / lam) / z for k in ks]
        rho = star if prompter is None else prompter[x]
        used = [k for k in ks if prior[x][k] > 0 or (prompter is not None and rho[k] > 0)]
        reach = [y for y in ys if pi_f[y] > 0 or any(frozen[k][y] > 0 for k in used)]
        span = max(reward[x][y] for y in reach) - min(reward[x][y] for y in reach)
        e_pi = sum(pi[y] * reward[x][y] for y in ys)
        e_rho = sum(rho[k] * r[k] for k in ks)
        e_star = sum(star[k] * r[k] for k in ks)
        e_prior = sum(prior[x][k] * r[k] for k in ks)
        tv1, tv2 = tv(pi, pi_f), sum(prior[x][k] * tv(pi_f, frozen[k]) for k in ks)
        mixed = [sum(prior[x][k] * frozen[k][y] for k in ks) for y in ys]
        induced = [sum(rho[k] * frozen[k][y] for k in ks) for y in ys]
        covered = all(pi_f[y] > 0 for y in ys if induced[y] > 0)
        overlap = sum(min(s, t) for s, t in zip(pi, pi_f, strict=True))
        mean = r[own[x]]
        var = sum(pi_f[y] * (reward[x][y] - mean) ** 2 for y in ys)
        rise = max(reward[x][y] for y in ys if pi_f[y] > 0) - mean
        kl_pi = max(kl(pi, pi_f), 0 * e_pi)
        root = min((kl_pi / 2) ** 0.5, (1 - exp(-kl_pi)) ** 0.5)
        own_rewards = [reward[x][y] for y in ys if pi_f[y] > 0]
        own_span = max(own_rewards) - min(own_rewards)
        by_points = two_point(var, rise)
        artanh = (log(1 + tv1) - log(overlap)) / 2
        out["log_z"].append(log(z))
        out["log_z_star"].append(log(z_star))
        out["rho"].append(star)
        out["pi"].append(pi)
        out["span"].append(span)
        row = {
            "j_star": e_pi,
            "j_rho": e_rho,
            "delta1": e_pi - r[own[x]],
            "delta2": r[own[x]] - e_rho,
            "shift": r[own[x]] - e_prior,
            "tv_model": tv1,
            "tv_shift": tv2,
            "span_model": own_span * tv1,
            "span_shift": span * tv2,
            "span_mean": span,
            "prompter_kl": lam * kl(star, prior[x]),
            "prompter_kl_back": lam * kl(prior[x], star),
            "model_kl": beta * kl(pi, pi_f),
            "model_kl_back": beta * kl(pi_f, pi),
            "kl_to_star": lam * kl(rho, star),
            "kl_to_reference": lam * kl(rho, prior[x]),
            "kl_from_star": lam * kl(star, rho),
            "kl_from_reference": lam * kl(prior[x], rho),
            "span_barycentre": span * tv(pi_f, mixed),
            "span_induced": span * tv(pi, induced),
            "law_model": wasserstein(pi, pi_f, reward[x]),
            "law_shift": wasserstein(pi_f, mixed, reward[x]),
            "law_induced": wasserstein(pi, induced, reward[x]),
            "by_points": by_points,
            "by_swapped": by_points if rise <= 0 else two_point(var, var / rise),
            "by_tanh": own_span * tanh(own_span / (4 * beta)),
            "by_beta": min(own_span**2 / (4 * beta), own_span),
            "by_eighth": min(own_span**2 / (8 * beta), own_span),
            "by_kl": own_span * root,
            "by_best": min(own_span * tv1, by_points),
            "ceiling": e_pi - max(r[k] for k in ks if prior[x][k] > 0),
            "value_gap": e_pi - lam * log(z),
            "induced_to_star": beta * kl(induced, pi) if covered else 0 * e_pi,
            "induced_to_model": beta * kl(induced, pi_f) if covered else 0 * e_pi,
            "pinsker": (kl_pi / 2) ** 0.5,
            "tanh": tanh(own_span / (4 * beta)),
            "quadratic": 4 * beta * tv1 * artanh,
        }
        row["shortfall"] = (e_star - row["prompter_kl"]) - (e_rho - row["kl_to_reference"])
        for key, value in row.items():
            sums[key] = sums.get(key, 0 * p[0]) + p[x] * value
    low = min(min(row) for row in reward)
    high = max(max(row) for row in reward)
    r_max = high if low >= 0 else high - low
    g, nothing = sums["j_star"] - sums["j_rho"], 0 * low
    t = dict(sums)
    forward, jeffreys = t["prompter_kl"], t["prompter_kl"] + t["prompter_kl_back"]
    terms, spans = r_max * (t["tv_model"] + t["tv_shift"]), t["span_model"] + t["span_shift"]
    rest = t["span_barycentre"] - jeffreys
    sides = {
        "theorem1": (g, terms - forward),
        "span": (g, spans - forward),
        "tight": (g, spans - jeffreys),
        "barycentre": (g, t["span_model"] + rest),
        "combined": (g, t["by_best"] + rest),
        "two_point": (g, t["by_points"] + rest),
        "two_point_swapped": (g, t["by_swapped"] + rest),
        "law": (g, t["delta1"] + t["law_shift"] - jeffreys),
        "law_half": (g, t["delta1"] + t["law_shift"] / 2 - jeffreys),
        "induced_law": (g, t["law_induced"]),
        "model_law": (t["law_model"], t["delta1"]),
        "beta_tanh": (g, t["by_tanh"] + rest),
        "beta_only": (g, t["by_beta"] + rest),
        "kl_only": (g, t["by_kl"] + rest),
        "trained": (g, spans + t["kl_to_star"] - t["kl_to_reference"]),
        "trained_tight": (
            g,
            t["span_model"]
            + t["span_barycentre"]
            + t["kl_to_star"]
            - t["kl_to_reference"]
            - t["prompter_kl_back"],
        ),
        "induced": (g, t["span_induced"]),
        "ceiling": (t["ceiling"], g),
        "kl_ceiling": (t["value_gap"] - t["kl_to_reference"], g),
        "drift": (t["model_kl"] - t["induced_to_model"], g),
        "mirror": (t["delta1"] - t["span_barycentre"] - jeffreys, g),
        "exact_gap": (g, t["model_kl"] + t["model_kl_back"] + t["shift"] - jeffreys),
        "suboptimality": (t["shortfall"], t["kl_to_star"]),
        "any_gap": (g, t["value_gap"] + t["kl_to_star"] - t["kl_to_reference"]),
        "regularised": (g, t["induced_to_star"] + t["model_kl"] - t["induced_to_model"]),
        "pinsker": (t["tv_model"], t["pinsker"]),
        "tanh_tv": (t["tv_model"], t["tanh"]),
        "jeffreys_tv": (t["quadratic"], t["delta1"]),
        "theorem1_l1": (g, 2 * terms - forward),
        "theorem1_kl_reversed": (g, terms - t["prompter_kl_back"]),
        "signed_max_abs": (g, max(abs(low), abs(high)) * (t["tv_model"] + t["tv_shift"]) - forward),
        "quarter_l1": (g, terms / 2 - forward),
        "beta_eighth": (g, t["by_eighth"] + rest),
        "never_outperforms": (nothing, g),
        "pinsker_l1": (2 * t["tv_model"], t["pinsker"]),
        "l1_at_most_one": (2 * t["tv_model"], nothing + 1),
        "suboptimality_reversed": (t["shortfall"], t["kl_from_star"]),
        "trained_reversed": (g, spans + t["kl_from_star"] - t["kl_from_reference"]),
    }
    return {**out, **sums, "gap": g, "r_max": r_max, "sides": sides}


def fields(instance):
    """The arrays of an instance, for `oracle`."""
    return tuple(np.asarray(getattr(instance, key)) for key in ("p", "prior", "frozen", "own", "reward"))


def exact(instance, beta, lam, prompter=None, digits=60):
    """`oracle` in `digits` digits, of the instance whose rows are divided by their exact sum."""
    with mpmath.workdps(digits):
        p, prior, frozen, own, reward = fields(instance)

        def numbers(array):
            if array.ndim > 1:
                return [numbers(row) for row in array]
            return [mpmath.mpf(float(v)) for v in array]

        def rows(array):
            if array.ndim > 1:
                return [rows(row) for row in array]
            values = numbers(array)
            total = mpmath.fsum(values)
            return [v / total for v in values]

        return oracle(
            rows(p),
            rows(prior),
            rows(frozen),
            [int(k) for k in own],
            numbers(reward),
            mpmath.mpf(float(beta)),
            mpmath.mpf(float(lam)),
            None if prompter is None else rows(np.asarray(prompter)),
            exp=mpmath.exp,
            log=mpmath.log,
        )


def close(a, b, magnitude, roundings):
    """|a − b| within `roundings` units of rounding of the magnitude actually summed."""
    return bool(np.all(np.abs(np.asarray(a) - np.asarray(b)) <= roundings * EPS * magnitude))


def finite(value):
    """No NaN anywhere, infinities allowed."""
    return not np.isnan(np.asarray(value, dtype=float)).any()


def kills(check, mutant):
    """A property's check must fail on a mutant: otherwise it tests nothing."""
    try:
        check(mutant)
    except AssertionError:
        return
    raise RuntimeError("the property accepts the mutant")


__all__ = ["COVER", "EPS", "close", "exact", "fields", "finite", "kills", "oracle"]
