"""Studies: fair comparisons of pruning methods that can be stopped at any moment and go on where they were."""

from secateur.study.spec import Study, read_study
from secateur.study.store import Store
from secateur.study.trials import Trial, trials_of

__all__ = ["Store", "Study", "Trial", "read_study", "trials_of"]
