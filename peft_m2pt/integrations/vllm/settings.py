"""What a server of a bundle has to know in all of its processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


# vLLM hands `additional_config` on to all of its processes, and compiles models anew where it differs.
FIELD = "m2pt"


@dataclass(frozen=True)
class Settings:
    """
    What a server of a bundle has to know in all of its processes.

    Args:
        bundle (`str`):
            The folder of the bundle.
        num_prompts (`int`):
            Number of textual prompts of a layer, with interaction prompts.
        salt (`str`):
            Tells the adapter from others.
    """

    bundle: str
    num_prompts: int
    salt: str

    @classmethod
    def of(cls, vllm_config: Any) -> Settings | None:
        """Those that are stored in a config of vLLM. `None` if no bundle is served."""
        config = vllm_config.additional_config
        return cls(**config[FIELD]) if isinstance(config, dict) and FIELD in config else None

    def store(self, vllm_config: Any) -> None:
        """Stores the settings in a config of vLLM."""
        vllm_config.additional_config = {**vllm_config.additional_config, FIELD: asdict(self)}
