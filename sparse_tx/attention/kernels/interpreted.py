"""Triton 3.6's interpreter under numpy 2.4: numpy refuses int(x) of an array with one element, which its loops need."""

from __future__ import annotations

import triton

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor, scope):
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_tensor_and_index
