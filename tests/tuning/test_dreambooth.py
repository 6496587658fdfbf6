"""DreamBooth's loss and gradient, computed directly: every weight of the UNet, class pictures, prior preservation."""

from __future__ import annotations

import pytest
import torch

from hyperdb.adapters import FullConfig
from hyperdb.adapters.layout import Layout
from hyperdb.adapters.site import Site
from hyperdb.diffusion.loss import predict, stratified_timesteps, target
from hyperdb.runtime.seed import generator
from hyperdb.tuning.fit import FitConfig, fit

RATE, WEIGHT = 0.1, 0.7


@pytest.mark.parametrize("which", ["unet", "everything"])
def test_one_step_is_the_gradient_of_dreambooths_loss(base, moments, prior, monkeypatch, which):
    monkeypatch.setattr("hyperdb.runtime.optim.adamw", lambda params, rate: torch.optim.SGD(list(params), lr=rate))
    sites = {name: Site(name, module) for name, module in base.places(which).items()}
    config = FitConfig(steps=1, levels=2, rate=RATE, decay=0.0, prior_weight=WEIGHT, prior_rows=3, signal_weight=None)
    adapter = FullConfig(which).build(Layout.listing(sites))
    adapter.text_rate = 1.0
    found = fit(base, adapter, moments[:1], config, prior=prior)

    # E |eps(z_t, "a [V] face") - eps|^2 + weight E |eps(z_t, "a face") - eps of the frozen network|^2
    g = generator(config.seed, "fit", 0)
    t = stratified_timesteps(1, 2, base.schedule.config.num_train_timesteps, g)[0]
    view = torch.randint(0, moments.shape[1], (2,), generator=g)
    jitter, noise = (torch.randn((2, *moments.shape[3:]), generator=g) for _ in "zn")
    z = moments[0, view, 0] + moments[0, view, 1] * jitter
    ids = base.tokenize([base.config.instance_prompt]).expand(2, -1)
    names = {name: site.parameter for name, site in sites.items()}
    covered = {id(p) for p in names.values()}
    assert {id(p) for p in base.unet.parameters()} <= covered
    try:
        for parameter in names.values():
            parameter.requires_grad_(True)
        own = predict(base, z, noise, t, ids) - target(base.schedule, z, noise, t)
        pz, pnoise, pt, pids, kept = prior.rows(3, config.seed, 0)
        class_error = predict(base, pz, pnoise, pt, pids) - kept
        loss = own.square().mean() + WEIGHT * class_error.square().mean()
        gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    finally:
        for parameter in names.values():
            parameter.requires_grad_(False)
    moved = 0
    for name, gradient in zip(names, gradients, strict=True):
        wanted = torch.zeros_like(found[name][0]) if gradient is None else -RATE * gradient
        torch.testing.assert_close(found[name][0], wanted, rtol=2e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        moved += bool(wanted.any())
    assert moved > 0.9 * len(names)
