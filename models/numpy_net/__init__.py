"""Neural networks in NumPy alone: every layer a `forward` and a `backward`, no automatic differentiation.

Conventions that all modules keep:

- Rows are examples: x [N, D], weights [D, M], biases [M].
- `name_forward(x, ...) -> (out, cache)`; `name_backward(d_out, cache)` returns dL/d(argument) for each array argument
  of the forward, in its order.  `d_out` is dL/dout and has out's shape; every gradient has the shape of its array.
- A loss takes (scores, targets) and returns (mean loss, dL/dscores): the two are cheaper, and stabler, together.
- The dtype of the input is kept: float32 to train, float64 to check gradients.

Modules: layers, losses, initialisers, optim; net (a network of any depth of them); gradcheck (finite differences) and
checks (what a network must pass); twin (the same network in Keras: the only module that needs TensorFlow).
"""
