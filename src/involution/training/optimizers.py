"""Optimizers of recipes."""

import keras


def make_optimizer(recipe, steps) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe.

    Args:
        recipe: The recipe.
        steps: Total number of optimizer steps.
    """
    accumulation = recipe.gradient_accumulation_steps
    rate = make_schedule(recipe, steps)
    if accumulation > 1 and not isinstance(rate, float):
        rate = _PerBatchSchedule(rate, accumulation)
    arguments = {"global_clipnorm": recipe.clip_norm}
    if accumulation > 1:
        arguments["gradient_accumulation_steps"] = accumulation
    if recipe.ema_momentum is not None:
        # Keras updates the average after each accumulation step.
        momentum = recipe.ema_momentum ** (1 / accumulation)
        arguments |= {"use_ema": True, "ema_momentum": momentum}
    if recipe.optimizer == "sgd":
        return NesterovSGD(rate, recipe.weight_decay, **arguments)
    if recipe.weight_decay == 0:
        return keras.optimizers.Adam(rate, **arguments)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.weight_decay, **arguments)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def make_schedule(recipe, steps) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate of a recipe over a number of optimizer steps."""
    peak, warmup_steps = recipe.learning_rate, int(steps * (recipe.warmup_fraction or 0))
    decay_steps = max(steps - warmup_steps, 1)
    schedule = recipe.schedule or ("constant" if recipe.warmup_fraction is None else "cosine")
    if schedule == "cosine" and recipe.warmup_fraction is not None:
        return keras.optimizers.schedules.CosineDecay(
            peak * recipe.warmup_start_factor,
            decay_steps,
            warmup_target=peak,
            warmup_steps=warmup_steps,
        )
    decays = {
        "constant": peak,
        "cosine": keras.optimizers.schedules.CosineDecay(peak, decay_steps),
        "linear": keras.optimizers.schedules.PolynomialDecay(peak, decay_steps, 0.0),
    }
    if warmup_steps == 0:
        return decays[schedule]
    return _Warmup(peak * recipe.warmup_start_factor, peak, warmup_steps, decays[schedule])


class _Warmup(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise, and then another schedule or a constant rate."""

    def __init__(self, start, peak, steps, after):
        self.start, self.peak, self.steps, self.after = start, peak, steps, after

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rising = self.start + (self.peak - self.start) * step / self.steps
        after = (
            self.after(keras.ops.maximum(step - self.steps, 0.0))
            if callable(self.after)
            else self.after
        )
        return keras.ops.where(step < self.steps, rising, after)


class _PerBatchSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule over batches; Keras calls it with the number of accumulation steps."""

    def __init__(self, schedule, accumulation):
        self.schedule, self.accumulation = schedule, accumulation

    def __call__(self, step):
        return self.schedule(keras.ops.floor_divide(step, self.accumulation))


class NesterovSGD(keras.optimizers.SGD):
    """SGD with a Nesterov momentum of 0.9 and the weight decay of PyTorch's SGD.

    The decay is added to the gradient, so that the momentum includes it. Keras's weight decay is
    subtracted from the weights, with a tenth of the effect at a momentum of 0.9.

    Args:
        learning_rate: A number or a schedule.
        decay: Fraction of each weight that is added to its gradient.
        kwargs: Arguments of ``keras.optimizers.SGD``.
    """

    def __init__(self, learning_rate, decay=0.0, **kwargs):
        super().__init__(learning_rate, momentum=0.9, nesterov=True, **kwargs)
        self.decay = decay

    def update_step(self, gradient, variable, learning_rate):
        decayed = keras.ops.cast(gradient, variable.dtype) + self.decay * variable
        super().update_step(decayed, variable, learning_rate)
