"""Every quantity written out from its formula, in plain NumPy: nothing shared with the package.

`exact` evaluates the same lines on mpmath numbers, for temperatures and scales where floats give out.
"""

import mpmath
import numpy as np

EPS = 2.0**-52


def oracle(p, prior, frozen, own, reward, beta, lam, prompter=None, exp=np.exp, log=np.log):
    """Scalars and per-prompt lists, from the definitions. Floats, or object arrays of mpmath numbers."""
    xs, ks, ys = range(len(p)), range(len(frozen)), range(len(frozen[0]))

    def kl(a, b):
        return sum((s * log(s / t) for s, t in zip(a, b, strict=True) if s > 0), start=0 * a[0])

    def tv(a, b):
        return sum(abs(s - t) for s, t in zip(a, b, strict=True)) / 2

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
        reach = [y for y in ys if pi_f[y] > 0 or any(prior[x][k] > 0 and frozen[k][y] > 0 for k in ks)]
        span = max(reward[x][y] for y in reach) - min(reward[x][y] for y in reach)
        e_pi = sum(pi[y] * reward[x][y] for y in ys)
        e_rho = sum(rho[k] * r[k] for k in ks)
        e_star = sum(star[k] * r[k] for k in ks)
        e_prior = sum(prior[x][k] * r[k] for k in ks)
        tv1, tv2 = tv(pi, pi_f), sum(prior[x][k] * tv(pi_f, frozen[k]) for k in ks)
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
            "span_model": span * tv1,
            "span_shift": span * tv2,
            "span_mean": span,
            "prompter_kl": lam * kl(star, prior[x]),
            "prompter_kl_back": lam * kl(prior[x], star),
            "model_kl": beta * kl(pi, pi_f),
            "model_kl_back": beta * kl(pi_f, pi),
            "kl_to_star": lam * kl(rho, star),
            "kl_to_reference": lam * kl(rho, prior[x]),
        }
        row["shortfall"] = (e_star - row["prompter_kl"]) - (e_rho - row["kl_to_reference"])
        for key, value in row.items():
            sums[key] = sums.get(key, 0 * p[0]) + p[x] * value
    low = min(min(row) for row in reward)
    high = max(max(row) for row in reward)
    r_max = high if low >= 0 else high - low
    gap = sums["j_star"] - sums["j_rho"]
    return {
        **out,
        **sums,
        "gap": gap,
        "r_max": r_max,
        "theorem1": r_max * sums["tv_model"] + r_max * sums["tv_shift"] - sums["prompter_kl"],
        "span_form": sums["span_model"] + sums["span_shift"] - sums["prompter_kl"],
        "tight": sums["span_model"] + sums["span_shift"] - sums["prompter_kl"] - sums["prompter_kl_back"],
        "trained": sums["span_model"] + sums["span_shift"] + sums["kl_to_star"] - sums["kl_to_reference"],
        "exact_gap": sums["model_kl"]
        + sums["model_kl_back"]
        + sums["shift"]
        - sums["prompter_kl"]
        - sums["prompter_kl_back"],
    }


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


__all__ = ["EPS", "close", "exact", "fields", "finite", "kills", "oracle"]
