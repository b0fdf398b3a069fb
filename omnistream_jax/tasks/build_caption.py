"""From a config to the task of vision-language alignment."""

from ml_collections import ConfigDict

from omnistream_jax.config import ConfigError
from omnistream_jax.data.captions import CaptionData
from omnistream_jax.data.chat import Chat, load_chat
from omnistream_jax.data.errors import DataError
from omnistream_jax.models.backbone import Backbone
from omnistream_jax.models.projector import Projector
from omnistream_jax.models.qwen3 import Qwen3, Qwen3Config, decoder_preset
from omnistream_jax.tasks.build_fields import data_of_task, open_sources, require, require_whole_batches
from omnistream_jax.tasks.caption import CaptionTask


def check_language(fields: ConfigDict) -> None:
    """Raises ConfigError for a value of `config.language` that cannot be."""
    require(fields.kernel_std > 0, "language.kernel_std", fields.kernel_std, "a positive number")
    require(fields.rope_jitter > 0, "language.rope_jitter", fields.rope_jitter, "a positive number")
    require(fields.chunk >= 1, "language.chunk", fields.chunk, "1 or more")


def build_caption(name: str, fields: ConfigDict, config: ConfigDict, backbone: Backbone) -> CaptionTask:
    """The task `name` of `config.tasks`, of kind "captioned"; arguments as of `build_self_supervision`."""
    shared, patch = config.language, backbone.config.patch_size
    require_whole_batches(name, fields, config.mesh)
    fits = fields.size >= patch and fields.size % patch == 0
    require(fits, f"tasks.{name}.size", fields.size, f"a multiple of {patch}")
    chat = _chat(config)
    decoder = Qwen3(_decoder_config(shared.decoder, chat), dtype=backbone.dtype, remat=config.model.remat)
    sources, weights = open_sources(name, fields)
    with data_of_task(name):
        data = CaptionData(
            sources=sources,
            global_batch_size=fields.batch_size,
            weights=weights,
            tokenizer=chat.path,
            max_tokens=fields.max_tokens,
            captions_per_row=fields.captions_per_row,
            texts_per_image=fields.texts_per_image,
            size=fields.size,
        )
    return CaptionTask(
        name=name,
        weight=fields.weight,
        data=data,
        backbone=backbone,
        projector=Projector(decoder.config.width, dtype=backbone.dtype),
        decoder=decoder,
        chunk=shared.chunk,
        kernel_std=shared.kernel_std,
        rope_jitter=shared.rope_jitter,
        micro_batches=fields.micro_batches,
    )


def _chat(config: ConfigDict) -> Chat:
    """The tokenizer that the config names, or else that of the decoder to start from."""
    named = {"language.tokenizer": config.language.tokenizer, "init.decoder": config.init.decoder}
    field = next((field for field, path in named.items() if path), None)
    if field is None:
        raise ConfigError("language.tokenizer: expected a directory, hub id or file, since there is no init.decoder")
    try:
        return load_chat(named[field])
    except DataError as error:
        raise ConfigError(f"{field}: {str(error).removeprefix('tokenizer: ')}") from error


def _decoder_config(fields: ConfigDict, chat: Chat) -> Qwen3Config:
    """The preset with the values that are not 0 or "auto"; a vocabulary of 0 is the tokenizer's."""
    require(fields.tied in ("auto", "yes", "no"), "language.decoder.tied", fields.tied, "auto, yes or no")
    changes = {"vocabulary_size": chat.vocabulary_size}
    changes |= {field: value for field, value in fields.items() if field not in ("preset", "tied") and value != 0}
    changes |= {} if fields.tied == "auto" else {"tied": fields.tied == "yes"}
    try:
        config = decoder_preset(fields.preset, **changes)
    except ValueError as error:
        raise ConfigError(f"language.decoder.{str(error).removeprefix('decoder.')}") from error
    try:
        chat.check_vocabulary(config.vocabulary_size)
    except DataError as error:
        raise ConfigError(f"language.{error}") from error
    return config
