"""Models for coverage.py, with random weights: how to build each, and one batch for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Callable[[int], Any]]  # the model, and count -> a batch of so many samples
SUITES: dict[str, Callable[[], Mapping[str, Callable[[], Made]]]] = {}


def suite(function: Callable[[], Mapping[str, Callable[[], Made]]]):
    SUITES[function.__name__] = function
    return function


def images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, channels, size, size)


# ------------------------------------------------------------------------------------------- torchvision

# Networks that refuse small images, or whose last stage would be a single pixel wide.
_SIZES = {"vit_h_14": 112, "inception_v3": 128, "googlenet": 96, "maxvit_t": 224, "alexnet": 96}


def torchvision_kinds() -> dict[str, str]:
    """Name in the suite -> what it is for; of a detector, which part."""
    from torchvision import models

    kinds = {"classification": models, "segmentation": models.segmentation, "video": models.video,
             "optical flow": models.optical_flow, "detection": models.detection}  # fmt: skip
    parts = {"detection": ("backbone", "dense", "whole")}
    return {
        f"{name}.{part}" if part else name: f"{kind} {part}".strip()
        for kind, module in kinds.items()
        for name in models.list_models(module=module)
        for part in parts.get(kind, ("",))
    }


@suite
def torchvision() -> dict[str, Callable[[], Made]]:
    """Every model that torchvision registers. A detector three times: its backbone with its neck; that with the dense
    heads ("dense"), before boxes are chosen; and whole, which takes lists of images and suppresses boxes."""
    found = torchvision_kinds()
    return {key: lambda key=key, kind=kind: _torchvision(key, *kind.split()) for key, kind in found.items()}


class _Dense(nn.Module):
    """Backbone, neck and the heads that every pixel has: of a two-stage detector those that propose regions."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


@contextmanager
def _small_mvit() -> Iterator[None]:
    """Its builders fix 16 frames of 224 pixels."""
    from torchvision.models.video import mvit

    own = mvit._mvit
    mvit._mvit = lambda **options: own(**{**options, "spatial_size": (64, 64), "temporal_size": 8})
    try:
        yield
    finally:
        mvit._mvit = own


def _small_branches(model: nn.Module) -> None:
    """Residual branches a tenth of the stream, nearly as training starts with (Goyal et al., 2017): in networks as deep
    as these, with branches as large as the stream, rounding errors grow to the size of the output, and nothing can be
    proven."""
    for block in model.modules():
        if getattr(block, "use_res_connect", False):
            nn.init.constant_(block.block[-1][1].weight, 0.1)  # type: ignore[union-attr, index]


def _torchvision(key: str, kind: str, part: str = "") -> Made:
    from torchvision import models

    name = key.partition(".")[0]
    options: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = 112 if name == "vit_h_14" else 64
    with _small_mvit():
        model = models.get_model(name, **options)
    if name in ("efficientnet_b7", "efficientnet_v2_l"):
        _small_branches(model)
    if kind == "video":
        frames, side = (16, 224) if name == "s3d" else (8, 64)
        return model, lambda n: torch.randn(n, 3, frames, side, side)
    if kind == "optical":
        return model, lambda n: tuple(torch.randn(n, 3, 128, 128) for _ in range(2))
    if kind == "detection":
        batch = images(300 if name.startswith("ssd300") else 96)
        if part == "whole":
            return model, lambda n: [list(batch(n))]
        return model.backbone if part == "backbone" else _Dense(model), batch
    return model, images(_SIZES.get(name, 96 if kind == "segmentation" else 64))


# ------------------------------------------------------------------------------------------------- timm

_TIMM = """
    halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224
    densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mobilenetv2_035
    efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
    hrnet_w18_small iformer_t inception_next_atto inception_v3 lcnetv2_small levit_128s lowformer_b0
    mambaout_femto maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 mobilevit_xxs
    mvitv2_tiny nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m1
    res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
    skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256
    swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 twins_svt_small vgg11 visformer_tiny
    vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41p xcit_nano_12_p8_224 beit_base_patch16_224 deepseek_vit_412m gemma4_vit_167m
    mobilenetv5_base naflexvit_base_patch16_parfac_gap nasnetalarge pnasnet5large qwen3_vit_88m
    samvit_base_patch16_224 inception_resnet_v2 inception_v4 tresnet_m rdnet_tiny vit_srelpos_small_patch16_224
"""  # the smallest model of every module of timm 1.0.31


@suite
def timm() -> dict[str, Callable[[], Made]]:
    return {name: lambda name=name: _timm(name) for name in _TIMM.split()}


def _timm(name: str) -> Made:
    """At 64 to 128 pixels where the model takes them, else at its own size. A model whose output is its features has
    nothing to merge: it gets a head."""
    import timm as library

    own = library.get_pretrained_cfg(name)
    full = own.input_size[-1] if own else 224
    head = {} if own and own.num_classes else {"num_classes": 10}

    def made(side: int, options: dict[str, int], device: str) -> nn.Module:
        with torch.device(device), torch.no_grad():
            model = library.create_model(name, **options, **head).eval()
            model(torch.randn(2, 3, side, side))
        return model

    last = None
    for device in ("meta", "cpu"):  # shapes tell quickly what a model takes, where it needs no values
        for side in (64, 96, 128, 112, full):  # 112 is a multiple of 14, too
            for options in ({"img_size": side}, {}):
                try:
                    model = made(side, options, device)
                    return model if torch.empty(0).is_meta else made(side, options, "cpu"), images(side)
                except Exception as error:
                    last = error
    raise last or ValueError(name)


# ----------------------------------------------------------------------------------------- transformers

_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 32, "patch_size": 8}  # fmt: skip
_DECODER = {**_TINY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# architecture -> (configuration class, model class, settings, inputs)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _TINY, "text"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**_TINY, "pad_token_id": 1}, "text"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 96}, "text"),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", {**_TINY, "embedding_size": 16}, "text"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", {**_TINY, "embedding_size": 16}, "text"),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification",
                   {**_TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
                    "norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3}, "text"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel",
             {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64}, "text"),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _DECODER, "text"),
    "opt": ("OPTConfig", "OPTForCausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 96,
             "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "text"),
    "bloom": ("BloomConfig", "BloomForCausalLM",
              {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_DECODER, "num_key_value_heads": 2}, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "num_key_value_heads": 2}, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**_DECODER, "num_key_value_heads": 2}, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_DECODER, "num_key_value_heads": 2, "head_dim": 8}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", _DECODER, "text"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM",
                {**_DECODER, "num_key_value_heads": 2, "num_local_experts": 4}, "text"),
    "mamba": ("MambaConfig", "MambaForCausalLM",
              {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 4}, "ids"),
    "t5": ("T5Config", "T5ForConditionalGeneration",
           {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 96,
            "decoder_start_token_id": 0}, "seq2seq"),
    "bart": ("BartConfig", "BartForConditionalGeneration",
             {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96,
              "max_position_embeddings": 64}, "seq2seq"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration",
                {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                 "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96,
                 "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0,
                 "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}, "speech"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification",
                 {**_TINY, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
                  "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
                  "classifier_proj_size": 16}, "wave"),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGE, "pixels"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _IMAGE, "pixels"),
    "swin": ("SwinConfig", "SwinForImageClassification",
             {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
              "window_size": 4}, "pixels"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _IMAGE, "pixels"),
    "clip": ("CLIPConfig", "CLIPModel",
             {"text_config": {**_DECODER, "eos_token_id": 95}, "vision_config": _IMAGE, "projection_dim": 24}, "both"),
    "siglip": ("SiglipConfig", "SiglipModel",
               {"text_config": {**_TINY, "max_position_embeddings": 64}, "vision_config": _IMAGE}, "both"),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation",
                  {"hidden_sizes": [16, 32], "depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1],
                   "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                   "decoder_hidden_size": 16, "num_labels": 5}, "pixels"),
    "detr": ("DetrConfig", "DetrForObjectDetection",
             {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
              "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 6}, "pixels"),
}  # fmt: skip


def _text(n: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 95, (n, 12)), "attention_mask": torch.ones(n, 12, dtype=torch.long)}


def _pixels(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


INPUTS: dict[str, Callable[[int], Any]] = {
    "text": _text,
    "ids": lambda n: {"input_ids": torch.randint(5, 95, (n, 12))},
    "seq2seq": lambda n: {**_text(n), "decoder_input_ids": torch.randint(5, 95, (n, 6))},
    "speech": lambda n: {"input_features": torch.randn(n, 8, 40), "decoder_input_ids": torch.randint(5, 95, (n, 6))},
    "wave": lambda n: {"input_values": torch.randn(n, 400)},
    "pixels": _pixels,
    "both": lambda n: {**_text(n), **_pixels(n)},
}


@suite
def transformers() -> dict[str, Callable[[], Made]]:
    return {name: lambda name=name: _transformers(name) for name in ARCHITECTURES}


def _transformers(name: str) -> Made:
    import transformers as library

    config, kind, settings, inputs = ARCHITECTURES[name]
    settings = dict(settings)
    if name == "detr":
        backbone = library.ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], out_features=["stage2"]
        )
        settings |= {"backbone_config": backbone, "use_timm_backbone": False, "backbone": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(library, kind)(getattr(library, config)(**settings))
    if name == "mixtral":
        model.set_experts_implementation("batched_mm")  # the default is an operator of transformers' own
    return model, INPUTS[inputs]
