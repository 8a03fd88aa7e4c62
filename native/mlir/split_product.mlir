// The product of split_product.f90 on memrefs, the form that MLIR's own passes can take to a processor or a graphics card.
//
// packed [rows, tiles, 112], x [tokens, tiles, 4], step and offset [outputs, 2], scale [tokens], y [tokens, outputs];
// sums [tokens, 2] is space for the sums of the activations over even and odd inputs.
func.func @split_product(%packed: memref<?x?x112xi8>, %x: memref<?x?x4xi8>, %step: memref<?x2xf32>, %offset: memref<?x2xf32>,
                         %scale: memref<?xf32>, %sums: memref<?x2xi32>, %y: memref<?x?xf32>) attributes {llvm.emit_c_interface} {
  %c0 = arith.constant 0 : index
  %c1 = arith.constant 1 : index
  %c2 = arith.constant 2 : index
  %c3 = arith.constant 3 : index
  %c7 = arith.constant 7 : index
  %c8 = arith.constant 8 : index
  %c14 = arith.constant 14 : index
  %c64 = arith.constant 64 : index
  %c111 = arith.constant 111 : index
  %zero = arith.constant 0 : i32
  %shift4 = arith.constant 4 : i32
  %shift7 = arith.constant 7 : i32
  %shift8 = arith.constant 8 : i32
  %shift11 = arith.constant 11 : i32
  %shift16 = arith.constant 16 : i32
  %mask3 = arith.constant 7 : i32
  %mask4 = arith.constant 15 : i32
  %tokens = memref.dim %y, %c0 : memref<?x?xf32>
  %outputs = memref.dim %y, %c1 : memref<?x?xf32>
  %tiles = memref.dim %x, %c1 : memref<?x?x4xi8>

  // XE and XO: input 4*t + j is even when j is
  linalg.fill ins(%zero : i32) outs(%sums : memref<?x2xi32>)
  %pairs = memref.expand_shape %x [[0], [1], [2, 3]] output_shape [%tokens, %tiles, 2, 2] : memref<?x?x4xi8> into memref<?x?x2x2xi8>
  linalg.generic {indexing_maps = [affine_map<(m, k, t, p) -> (m, t, p, k)>, affine_map<(m, k, t, p) -> (m, k)>],
                  iterator_types = ["parallel", "parallel", "reduction", "reduction"]}
                 ins(%pairs : memref<?x?x2x2xi8>) outs(%sums : memref<?x2xi32>) {
  ^bb0(%value: i8, %sum: i32):
    %wide = arith.extsi %value : i8 to i32
    %more = arith.addi %sum, %wide : i32
    linalg.yield %more : i32
  }

  scf.parallel (%m, %n) = (%c0, %c0) to (%tokens, %outputs) step (%c1, %c1) {
    %row = arith.divui %n, %c64 : index
    %o = arith.remui %n, %c64 : index
    %bit = arith.muli %o, %c14 : index
    %first = arith.divui %bit, %c8 : index
    %second = arith.addi %first, %c1 : index
    %next = arith.addi %first, %c2 : index
    %third = arith.minui %next, %c111 : index
    %low = arith.andi %bit, %c7 : index
    %shift = arith.index_cast %low : index to i32
    %even, %odd = scf.for %t = %c0 to %tiles step %c1 iter_args(%e = %zero, %d = %zero) -> (i32, i32) {
      %b0 = memref.load %packed[%row, %t, %first] : memref<?x?x112xi8>
      %b1 = memref.load %packed[%row, %t, %second] : memref<?x?x112xi8>
      %b2 = memref.load %packed[%row, %t, %third] : memref<?x?x112xi8>
      %w0 = arith.extui %b0 : i8 to i32
      %w1 = arith.extui %b1 : i8 to i32
      %w2 = arith.extui %b2 : i8 to i32
      %s1 = arith.shli %w1, %shift8 : i32
      %s2 = arith.shli %w2, %shift16 : i32
      %or1 = arith.ori %w0, %s1 : i32
      %or2 = arith.ori %or1, %s2 : i32
      %word = arith.shrui %or2, %shift : i32
      %u1 = arith.shrui %word, %shift4 : i32
      %u2 = arith.shrui %word, %shift7 : i32
      %u3 = arith.shrui %word, %shift11 : i32
      %q0 = arith.andi %word, %mask4 : i32
      %q1 = arith.andi %u1, %mask3 : i32
      %q2 = arith.andi %u2, %mask4 : i32
      %q3 = arith.andi %u3, %mask3 : i32
      %x0 = memref.load %x[%m, %t, %c0] : memref<?x?x4xi8>
      %x1 = memref.load %x[%m, %t, %c1] : memref<?x?x4xi8>
      %x2 = memref.load %x[%m, %t, %c2] : memref<?x?x4xi8>
      %x3 = memref.load %x[%m, %t, %c3] : memref<?x?x4xi8>
      %a0 = arith.extsi %x0 : i8 to i32
      %a1 = arith.extsi %x1 : i8 to i32
      %a2 = arith.extsi %x2 : i8 to i32
      %a3 = arith.extsi %x3 : i8 to i32
      %p0 = arith.muli %q0, %a0 : i32
      %p1 = arith.muli %q1, %a1 : i32
      %p2 = arith.muli %q2, %a2 : i32
      %p3 = arith.muli %q3, %a3 : i32
      %e1 = arith.addi %e, %p0 : i32
      %e2 = arith.addi %e1, %p2 : i32
      %d1 = arith.addi %d, %p1 : i32
      %d2 = arith.addi %d1, %p3 : i32
      scf.yield %e2, %d2 : i32, i32
    }
    %xe = memref.load %sums[%m, %c0] : memref<?x2xi32>
    %xo = memref.load %sums[%m, %c1] : memref<?x2xi32>
    %s4 = memref.load %step[%n, %c0] : memref<?x2xf32>
    %s3 = memref.load %step[%n, %c1] : memref<?x2xf32>
    %z4 = memref.load %offset[%n, %c0] : memref<?x2xf32>
    %z3 = memref.load %offset[%n, %c1] : memref<?x2xf32>
    %fe = arith.sitofp %even : i32 to f32
    %fo = arith.sitofp %odd : i32 to f32
    %fxe = arith.sitofp %xe : i32 to f32
    %fxo = arith.sitofp %xo : i32 to f32
    %t1 = arith.mulf %s4, %fe : f32
    %t2 = arith.mulf %s3, %fo : f32
    %t3 = arith.addf %t1, %t2 : f32
    %t4 = arith.mulf %z4, %fxe : f32
    %t5 = arith.addf %t3, %t4 : f32
    %t6 = arith.mulf %z3, %fxo : f32
    %t7 = arith.addf %t5, %t6 : f32
    %factor = memref.load %scale[%m] : memref<?xf32>
    %result = arith.mulf %factor, %t7 : f32
    memref.store %result, %y[%m, %n] : memref<?x?xf32>
    scf.reduce
  }
  return
}
