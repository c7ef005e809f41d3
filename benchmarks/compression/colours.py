"""How each kind of training looks in all pictures."""

from __future__ import annotations

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    None: "#6b7280",
    "l2": "#cc79a7",
    "kurtosis": "#d55e00",
    "linf": "#e69f00",
    "margin": "#009e73",
    "soft_min_max": "#0072b2",
}
MARKERS = {None: "o", "l2": "v", "kurtosis": "P", "linf": "s", "margin": "^", "soft_min_max": "D"}
