// The table of one instruction set. Included last inside its namespace.

const Kernels kernels = {kInstructions, supported,  quantize, matmul,     matrix_row,   append,
                         begin_share,   attend,     join_share, finish_share, gated_unit,
                         multiply_bytes, multiply_floats};
