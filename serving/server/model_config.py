"""What a `ModelServerConfig` may say: the checks that the stock server makes before it takes a configuration."""

from pathlib import PurePosixPath

from serving.server.status import StatusError, invalid

_PLATFORM = "tensorflow"


def models_of(config, previous):
    """{name: `ModelConfig`} of a configuration that may follow `previous`, which is the same of the one in force.

    Raises `StatusError` with the stock server's code and words.  Source: ServerCore::ReloadConfig and what it calls
    (model_servers/server_core.cc).
    """
    kind = config.WhichOneof("config")
    if kind == "custom_model_config" or (previous and kind is None):  # the latter: a file caught before it is written
        raise StatusError(
            "FAILED_PRECONDITION",
            "Cannot transition to requested config. It is only legal to transition from one ModelConfigList to another",
        )
    models = {}
    for model in config.model_config_list.config:
        if model.name in models:
            raise invalid(f"Illegal to list model {model.name} multiple times in config list")
        if not model.name:
            raise invalid(f"the model with base_path {model.base_path!r} has no name")
        if not _is_absolute(model.base_path):
            raise invalid(
                f"Expected model {model.name} to have an absolute path or URI; got base_path()={model.base_path}"
            )
        models[model.name] = model
    for name, model in models.items():
        platform = _platform(model)
        if name in previous and platform != _PLATFORM:
            raise invalid(
                f"Illegal to change a model's platform. For model {name} platform was {_PLATFORM} and new platform "
                f"requested is {platform}"
            )
        if platform != _PLATFORM:
            raise invalid(f"Model {name} requests unsupported platform {platform}")
    return models


def _is_absolute(path):
    return PurePosixPath(path).is_absolute()


def _platform(model):
    """A model's platform, from whichever of the two fields gives it."""
    fields = "ModelServerConfig::model_type (deprecated)", "ModelServerConfig::model_platform"
    if model.model_type and model.model_platform:
        raise invalid(f"Illegal setting both {fields[0]} and {fields[1]}. (model {model.name})")
    if model.model_type:
        kind = model.DESCRIPTOR.fields_by_name["model_type"].enum_type.values_by_number
        name = kind[model.model_type].name if model.model_type in kind else str(model.model_type)
        if name != "TENSORFLOW":
            raise invalid(f"ModelServerConfig::model_type choice {name} not supported. (model {model.name})")
        return _PLATFORM
    if not model.model_platform:
        raise invalid(f'Illegal setting neither {fields[0]} nor {fields[1]}. (model {model.name}: give "tensorflow")')
    return model.model_platform
