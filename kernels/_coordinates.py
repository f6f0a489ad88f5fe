"""Settings that may differ between coordinates: a number, numbers per site, or a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from bnn.structure import Site

# A setting or coefficient in double precision, of shape () or (dim,).
Number: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]] | np.float64 | float"


def spread(sites: Mapping[str, Site], name: str, value: Any, default: float, positive: bool) -> Number:
    """``value`` as one number, or as one per coordinate of the flat vector.

    :param sites: the model's latent sites.
    :param name: the setting's name, for messages.
    :param value: a number, a dict of numbers per site, or a vector.
    :param default: for the sites that a dict leaves out.
    :param positive: whether zero is refused.
    :raises ValueError: if it is negative (``positive``: or zero), not finite, or of a wrong shape.
    """
    dim = max(site.slice.stop for site in sites.values())
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(sites))
        if unknown:
            raise ValueError(f"{name} names sites {unknown}; the model's latent sites are {list(sites)}.")
        result = torch.full((dim,), default, dtype=torch.float64)
        for site, number in value.items():
            place = sites[site].slice
            number = torch.as_tensor(number, dtype=torch.float64)
            if number.dim() and number.numel() != place.stop - place.start:
                raise ValueError(
                    f"{name} of site {site!r} has shape {tuple(number.shape)}; give a number or "
                    f"{tuple(sites[site].shape)}."
                )
            result[place] = number.reshape(-1) if number.dim() else number
    else:
        wanted = f"give a number, a dict of numbers per site, or a vector of {dim} values."
        try:
            result = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name} is {value!r}; {wanted}") from None
        if result.dim() and result.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(result.shape)}; {wanted}")
    good = torch.isfinite(result) & ((result > 0) if positive else (result >= 0))
    if not good.all():
        raise ValueError(f"{name} holds {result[~good][0].item():g}; give finite values {'>' if positive else '>='} 0.")
    numbers: np.ndarray[Any, np.dtype[np.float64]] = result.detach().cpu().numpy()
    return numbers if numbers.ndim else np.float64(numbers)
