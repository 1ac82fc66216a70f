"""Update rules: each changes `params` (name -> array) in place, given gradients of the same names and shapes."""


def sgd(params, gradients, lr):
    """Gradient descent: w <- w - lr dL/dw."""
    for name, gradient in gradients.items():
        params[name] -= lr * gradient
