"""What a recorded model's latent sites are to it: seen by the curvature or not, with a known prior or not."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from bnn.model_graph import ModelGraph, reaching


@dataclass
class Roles:
    """Roles of latent sites; a site may have several.

    :ivar behind_factors: sites that a ``pyro.factor`` depends on.
    :ivar missed: sites whose likelihood no probe, or not all of it, sees: those behind factors, and scales under
        ``"ggn"``.
    :ivar known_precision: sites whose prior is Normal and that no other site's prior depends on.
    :ivar fixed: those of them whose prior is the same Normal for all entries, always -> its location and scale.
    :ivar prior_of: site -> the sites that its prior depends on, itself included.
    """

    behind_factors: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)
    known_precision: set[str] = field(default_factory=set)
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    prior_of: dict[str, set[str]] = field(default_factory=dict)


def roles_of(model: ModelGraph) -> Roles:
    """Read the roles off the recorded graph.

    :param model: a model with a recording.
    """
    assert model.graph is not None
    nodes, sites = list(model.graph.graph.nodes), model.structure.sites
    output = next(node for node in nodes if node.op == "output")
    ends = dict(zip(model.keys, output.args[0], strict=True))
    placeholders = [node for node in nodes if node.op == "placeholder"]
    starts = dict(zip(sites, placeholders, strict=False))
    likelihoods = {name: end for (kind, name, _), end in ends.items() if kind == "likelihood"}
    factors = [end for name, end in likelihoods.items() if name not in model.observed]
    of_probes = reaching([end for (kind, *_), end in ends.items() if kind == "probe"], gradients=True)
    of_likelihood = reaching(list(likelihoods.values()), gradients=True)
    of_factors = reaching(factors, gradients=True)
    of_prior = {name: reaching([ends["prior", name, 0]]) for name in starts}
    roles = Roles()
    for name, node in starts.items():
        roles.prior_of[name] = {other for other, start in starts.items() if start in of_prior[name]}
        if node in of_factors:
            roles.behind_factors.add(name)
        if node in of_factors or (node in of_likelihood and node not in of_probes):
            roles.missed.add(name)
        if ("precision", name, 0) in ends and not any(node in of_prior[n] for n in starts if n != name):
            roles.known_precision.add(name)
            # Two runs saw the same numbers; they are fixed if no other latent, datum or parameter enters them.
            law: set[Node] = reaching([ends["prior", name, 0], ends["precision", name, 0]])
            normal = sites[name].normal
            if normal is not None and law.isdisjoint({*placeholders} - {node}):
                roles.fixed[name] = normal
    return roles
