"""One training loop, one evaluation, the recipe and the hooks they share."""

from secateur.training.evaluating import Metrics, evaluate
from secateur.training.hooks import Hook, Snapshot
from secateur.training.loop import Epoch, Fitted, fit
from secateur.training.recipes import Recipe, learning_rate

__all__ = ["Epoch", "Fitted", "Hook", "Metrics", "Recipe", "Snapshot", "evaluate", "fit", "learning_rate"]
