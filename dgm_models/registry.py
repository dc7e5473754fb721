"""Every method as a row of text: nothing is imported until it is asked for.

A method's name is the path of its file: "gan/wgan_gp" is `dgm_models/gan/wgan_gp.py`, and its function `wgan_gp`
builds (model, objective) from a DataSpec and keyword parameters; the function's signature is the params schema.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dgm_models.construct import ConfigError, did_you_mean


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: "family/method".
        paper: authors, year, arXiv number.
        capabilities: what the trained model can do (keys of `protocols.CAPABILITIES`).
        data: "kind:discrete" and "kind:real": the data it can be built for.
        synchronised: two ranks give the gradient of one. False is an exemption, and a law checks that it is one.
    """

    name: str
    paper: str
    capabilities: tuple[str, ...]
    data: tuple[str, ...]
    synchronised: bool = True

    @property
    def family(self) -> str:
        return self.name.split("/")[0]

    @property
    def file(self) -> str:
        """The method's file, from the repository's root."""
        return f"dgm_models/{self.name}.py"


_PIXELS = ("image:discrete", "codes:discrete")
_LEVELS = ("image:discrete", "vector:discrete", "codes:discrete")
_DRAWN = ("samples", "density", "completes")
_ANY_IMAGE = ("image:discrete", "vector:discrete", "vector:real")
_REAL = ("vector:real", "codes:real")
_DIFFUSION = ("samples", "bound", "score", "restores")
_FLOW = ("samples", "density", "latents")
_VAE = ("samples", "bound", "latents", "codes")
_VECTORS_FIRST = ("vector:real", "vector:discrete", "image:discrete")

ROWS: tuple[Row, ...] = (
    Row("vae/vae", "Kingma and Welling 2014, arXiv:1312.6114", _VAE, _ANY_IMAGE),
    Row("vae/beta_vae", "Higgins et al. 2017, ICLR", _VAE, _ANY_IMAGE),
    Row("vae/iwae", "Burda et al. 2016, arXiv:1509.00519", _VAE, _ANY_IMAGE),
    Row("vae/non_amortised", "Hoffman et al. 2013, arXiv:1206.7051", _VAE, _ANY_IMAGE),
    Row(
        "vae/gaussian_mixture",
        "Dempster, Laird, Rubin 1977; Cappe and Moulines 2009, arXiv:0712.4273",
        ("samples", "density"),
        ("vector:real", "codes:real"),
    ),
    Row("vae/ppca", "Tipping and Bishop 1999", ("samples", "density", "latents"), ("vector:real", "codes:real")),
    Row("gan/minimax", "Goodfellow et al. 2014, arXiv:1406.2661", ("samples",), _ANY_IMAGE),
    Row("gan/non_saturating", "Goodfellow et al. 2014, arXiv:1406.2661", ("samples",), _ANY_IMAGE),
    Row("gan/f_gan", "Nowozin et al. 2016, arXiv:1606.00709", ("samples",), _ANY_IMAGE),
    Row("gan/wgan", "Arjovsky et al. 2017, arXiv:1701.07875", ("samples",), _ANY_IMAGE),
    Row("gan/wgan_gp", "Gulrajani et al. 2017, arXiv:1704.00028", ("samples",), _ANY_IMAGE),
    Row("gan/hinge", "Lim and Ye 2017, arXiv:1705.02894", ("samples",), _ANY_IMAGE),
    Row("gan/semi_supervised", "Salimans et al. 2016, arXiv:1606.03498", ("samples", "features"), _ANY_IMAGE),
    Row("autoregressive/made", "Germain et al. 2015, arXiv:1502.03509", _DRAWN, _LEVELS),
    Row("autoregressive/histogram", "counts", _DRAWN, _LEVELS),
    Row("autoregressive/fvsbn", "Frey, Hinton, Dayan 1996; Gan et al. 2015", _DRAWN, _LEVELS),
    Row(
        "autoregressive/nade",
        "Larochelle and Murray 2011; Uria et al. 2016, arXiv:1605.02226",
        _DRAWN,
        _LEVELS,
    ),
    Row(
        "autoregressive/mixture_of_gaussians",
        "Uria, Murray, Larochelle 2013, arXiv:1306.0186",
        _DRAWN,
        _REAL,
    ),
    Row("autoregressive/pixel_rnn", "van den Oord et al. 2016, arXiv:1601.06759", _DRAWN, _PIXELS),
    Row("autoregressive/pixel_cnn", "van den Oord et al. 2016, arXiv:1601.06759", _DRAWN, _PIXELS),
    Row("autoregressive/gated_pixel_cnn", "van den Oord et al. 2016, arXiv:1606.05328", _DRAWN, _PIXELS),
    Row("autoregressive/pixel_cnn_pp", "Salimans et al. 2017, arXiv:1701.05517", _DRAWN, _PIXELS),
    Row(
        "autoregressive/rnn",
        "Graves 2013, arXiv:1308.0850",
        ("samples", "density", "completes"),
        ("tokens:discrete", "image:discrete", "vector:discrete", "codes:discrete", "audio:discrete"),
    ),
    Row(
        "autoregressive/wavenet",
        "van den Oord et al. 2016, arXiv:1609.03499",
        ("samples", "density", "completes"),
        ("audio:discrete", "tokens:discrete", "vector:discrete"),
    ),
    Row(
        "autoregressive/image_transformer",
        "Parmar et al. 2018, arXiv:1802.05751",
        ("samples", "density", "completes"),
        ("image:discrete", "codes:discrete", "tokens:discrete"),
    ),
    Row("vae/vq_vae", "van den Oord et al. 2017, arXiv:1711.00937", ("samples", "bound", "codes"), _ANY_IMAGE),
    Row("vae/vq_vae_2", "Razavi et al. 2019, arXiv:1906.00446", ("samples", "bound", "codes"), ("image:discrete",)),
    Row(
        "flows/nice",
        "Dinh et al. 2015, arXiv:1410.8516",
        _FLOW,
        ("image:discrete", "vector:discrete", "vector:real", "codes:real"),
    ),
    Row("flows/maf", "Papamakarios et al. 2017, arXiv:1705.07057", _FLOW, _REAL),
    Row("flows/iaf", "Kingma et al. 2016, arXiv:1606.04934", _FLOW, _REAL),
    Row("flows/neural_spline", "Durkan et al. 2019, arXiv:1906.04032", _FLOW, _REAL),
    Row("flows/real_nvp", "Dinh et al. 2017, arXiv:1605.08803", _FLOW, (*_ANY_IMAGE, "codes:real")),
    Row("flows/glow", "Kingma and Dhariwal 2018, arXiv:1807.03039", _FLOW, ("image:discrete", "vector:real")),
    Row(
        "flows/i_resnet",
        "Behrmann et al. 2019, arXiv:1811.00995; Chen et al. 2019, arXiv:1906.02735",
        _FLOW,
        ("image:discrete", "vector:real"),
    ),
    Row("diffusion/ddpm", "Ho et al. 2020, arXiv:2006.11239", _DIFFUSION, _ANY_IMAGE),
    Row(
        "diffusion/ncsn",
        "Song and Ermon 2019, arXiv:1907.05600; Song and Ermon 2020, arXiv:2006.09011",
        _DIFFUSION,
        _ANY_IMAGE,
    ),
    Row("diffusion/latent_diffusion", "Rombach et al. 2022, arXiv:2112.10752", _DIFFUSION, ("codes:real",)),
    Row("diffusion/score_sde", "Song et al. 2021, arXiv:2011.13456", _DIFFUSION, _ANY_IMAGE),
    Row("diffusion/edm", "Karras et al. 2022, arXiv:2206.00364", _DIFFUSION, _ANY_IMAGE),
    Row(
        "diffusion/flow_matching",
        "Lipman et al. 2023, arXiv:2210.02747; Tong et al. 2024, arXiv:2302.00482",
        _DIFFUSION,
        _ANY_IMAGE,
    ),
    Row(
        "diffusion/consistency",
        "Song et al. 2023, arXiv:2303.01469; Song and Dhariwal 2024, arXiv:2310.14189",
        ("samples",),
        _ANY_IMAGE,
    ),
    Row("flows/mint_net", "Song, Meng, Ermon 2019, arXiv:1907.07945", _FLOW, ("image:discrete", "vector:real")),
    Row(
        "energy/contrastive_divergence",
        "Hinton 2002; Du and Mordatch 2019, arXiv:1903.08689",
        ("samples", "energy", "restores"),
        _ANY_IMAGE,
    ),
    Row(
        "energy/persistent_cd",
        "Tieleman 2008; Du and Mordatch 2019, arXiv:1903.08689",
        ("samples", "energy", "restores"),
        _ANY_IMAGE,
    ),
    Row("energy/rbm", "Smolensky 1986; Hinton 2002; Tieleman 2008", ("samples", "energy"), _LEVELS),
    Row(
        "energy/exponential_family",
        "Koopman 1936; Barndorff-Nielsen 1978",
        ("samples", "density"),
        (*_REAL, *_LEVELS),
    ),
    Row("energy/score_matching", "Hyvarinen 2005", ("samples", "energy", "restores"), _VECTORS_FIRST),
    Row("energy/denoising_score_matching", "Vincent 2011", ("samples", "energy", "restores"), _VECTORS_FIRST),
    Row(
        "energy/sliced_score_matching",
        "Song et al. 2019, arXiv:1905.07088",
        ("samples", "energy", "restores"),
        _VECTORS_FIRST,
    ),
    Row(
        "energy/noise_contrastive",
        "Gutmann and Hyvarinen 2010",
        ("samples", "density", "energy", "restores"),
        _VECTORS_FIRST,
    ),
    Row(
        "energy/flow_contrastive",
        "Gao et al. 2020, arXiv:1912.00589",
        ("samples", "density", "energy"),
        _VECTORS_FIRST,
    ),
)

# what the pipeline trains but no leaderboard ranks
TOOLS: tuple[Row, ...] = (
    Row(
        "extractor/classifier",
        "a classifier's penultimate layer",
        ("features",),
        ("image:discrete",),
        synchronised=False,  # each rank normalises its features by its own share of the batch
    ),
)

METHODS: dict[str, Row] = {row.name: row for row in ROWS}


def row(name: str) -> Row:
    """The row of a method or tool, or ConfigError with the nearest name."""
    known = METHODS | {tool.name: tool for tool in TOOLS}
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"method.name: {name!r} is not registered{did_you_mean(str(name), METHODS)}")
    return known[name]


def builder(name: str) -> Callable[..., Any]:
    """The function that builds a method; importing it imports torch."""
    found = row(name)
    module = importlib.import_module(f"dgm_models.{found.name.replace('/', '.')}")
    function: Callable[..., Any] = getattr(module, found.name.split("/")[1])
    return function
