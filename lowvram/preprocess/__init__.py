"""Messages and their media -> model inputs, as the reference's processor makes them."""

from .prompt import MediumShape, Preprocessor, Prompt, PromptShape

__all__ = ["MediumShape", "Preprocessor", "Prompt", "PromptShape"]
