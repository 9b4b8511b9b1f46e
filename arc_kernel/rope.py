"""How a config.json names a model's rope, written so that transformers 4.57, 5.x and vLLM turn by the same angles.

transformers 4 has rope theta at the top and scaling in `rope_scaling`; 5 writes both into `rope_parameters`, and reads either form. Knows
configs only.
"""

from __future__ import annotations

OWN_NAMES = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # of theta and of the share of a head that is turned, in transformers 4's form
LOCAL_THETA = "rope_local_base_freq"  # Gemma 3's, of layers that see a window
BY_LAYER = ("gemma3_text", "olmo3")  # in transformers 5's form they name each kind of layer's rope


def names_of(config: dict) -> tuple[str, str]:
    """What transformers 4 calls rope theta and the share of a head that is turned, in a config of this architecture."""
    return OWN_NAMES.get(config.get("model_type"), ("rope_theta", "partial_rotary_factor"))


def portable_rope(config: dict) -> dict:
    """The config with its rope in transformers 4's form; as it is where that has none: several thetas, but for Gemma 3's two."""
    config = dict(config)
    rope, (theta, share) = config.get("rope_parameters") or {}, names_of(config)
    local = rope.get("sliding_attention") or {}
    if config.get("model_type") == "gemma3_text" and _plain(local) and "rope_theta" in local and "full_attention" in rope:
        config[LOCAL_THETA], rope = local["rope_theta"], rope["full_attention"]
    if "rope_theta" in rope:
        del config["rope_parameters"]
        config[theta] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:  # which 5.x reads there, and 4.x mostly at the top
            config[share] = rope["partial_rotary_factor"]
        config["rope_scaling"] = None if _plain(rope) else {k: v for k, v in rope.items() if k != "rope_theta"}
    return config


def lost_on_transformers_4(config: dict) -> bool:
    """Whether `rope_parameters` say what transformers 4, which does not read them, finds nowhere else in the config."""
    form = portable_rope(config)
    return by_layer(form) or any(form[name] != config.get(name) for name in form)


def write_both_forms(config: dict) -> None:
    """Write a config's rope theta as `rope_theta` (transformers 4) and inside `rope_parameters` (5).

    4.57 looks only at the first, and takes 10,000 where it is missing; 5.x takes the second before the first. Architectures whose ropes
    have names of their own, or differ by layer, keep the form of 4, which 5.x reads as well.
    """
    if by_layer(config):
        return
    theta, _ = names_of(config)
    config[theta] = theta_of(config)
    config["rope_scaling"] = scaling = config.get("rope_scaling") or None
    if theta == "rope_theta" and config.get("model_type") not in BY_LAYER:
        config["rope_parameters"] = (dict(scaling) if scaling else {"rope_type": "default"}) | {"rope_theta": config[theta]}


def theta_of(config: dict) -> float:
    """The rope theta of a config, in whichever form; the architecture's own default where it names none. Where it goes by kind of
    layer, that of the layers that see all the context."""
    from transformers import AutoConfig

    name, _ = names_of(config)

    def stated(theta: float | None, parameters: dict | None) -> float | None:
        parameters = parameters or {}
        return theta or parameters.get("rope_theta") or parameters.get("full_attention", {}).get("rope_theta")

    theta = stated(config.get(name), config.get("rope_parameters"))
    if theta is None:
        made = AutoConfig.for_model(**config)
        theta = stated(getattr(made, name, None), getattr(made, "rope_parameters", None))
    return float(theta or 10_000)


def by_layer(config: dict) -> bool:
    """Whether a config names several rope thetas, by kind of layer."""
    return any(isinstance(part, dict) for part in (config.get("rope_parameters") or {}).values())


def _plain(rope: dict) -> bool:
    return rope.get("rope_type", "default") == "default"
