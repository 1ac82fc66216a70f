"""Neural networks in NumPy: every layer a `forward` and a `backward`, no automatic differentiation.

Conventions that all modules keep:

- Rows are examples: x [N, D], weights [D, M], biases [M].
- `name_forward(x, ...) -> (out, cache)`; `name_backward(d_out, cache)` returns dL/d(argument) for each array argument
  of the forward, in its order.  `d_out` is dL/dout and has out's shape; every gradient has the shape of its array.
- A loss takes (scores, targets) and returns (mean loss, dL/dscores): the two are cheaper, and stabler, together.
- The dtype of the input is kept: float32 to train, float64 to check gradients.
- Pictures are [N, H, W, C] and kernels [kh, kw, C, F], as in Keras.

Modules, in NumPy alone: layers, conv, norm, dropout, losses, initialisers, optim; net (a network of any depth of dense
layers); solver (trains it, or any other model); linear, knn; gradcheck (finite differences) and checks (what a network
must pass); trials (trainings one beside another), over_seeds (a quantity from several seeds), surfaces (update rules on
surfaces, the noise of a gradient).  Beside Keras: twin (the same network), rule_checks (the update rules), convnet (a
convolutional network in several versions), benchmark (the speed, beside scikit-learn's too).
"""
