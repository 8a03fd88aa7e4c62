! Bytes to symbols, fields and levels, with the worked bytes of SPEC.md section 8; activations to int8
program test_quantization
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int32_t, c_int64_t
  use septet_activations, only: quantize, rotate
  use septet_asserting, only: check, finish
  use septet_codes, only: pack_tile, split_fields, trellis_tile, unpack_tile
  implicit none
  integer(c_int8_t) :: split(112), counting(112), matrix(64, 4), symbols(128), again(128), tile(128), values(4)
  real(c_float) :: x(4), scales(1), turned(8)
  integer :: i, bits

  split = 0
  split(1) = int(-75, c_int8_t)  ! 0xB5
  split(2) = 63
  call split_fields(split, matrix)
  call check(all(matrix(1, :) == [5, 3, 15, 7]), "the worked bytes of split")
  call check(all(matrix(2:, :) == 0), "padding of split")

  counting = [(int(i, c_int8_t), i=0, 111)]
  call trellis_tile(counting, 7, matrix)
  call check(all(matrix(1, :) == [1, 9, 25, -54]), "the worked bytes of trellis, pairs 0 and 1")
  call check(all(matrix(64, 3:4) == [8, 16]), "the worked bytes of trellis, pair 127, around the tile's end")

  do bits = 6, 8
    symbols = [(int(modulo(37 * i, 2**bits) - merge(256, 0, modulo(37 * i, 2**bits) > 127), c_int8_t), i=1, 128)]
    call pack_tile(symbols, bits, tile(:16 * bits))
    call unpack_tile(tile(:16 * bits), bits, again)
    call check(all(again == symbols), "unpack(pack(symbols)) at a width")
  end do

  x = [127.0, -63.5, 0.5, 1.5]
  call quantize(x, 4_c_int64_t, values, scales)
  call check(scales(1) >= 1 .and. scales(1) <= 1, "scale is absmax / 127")
  call check(all(values == [127, -64, 0, 2]), "halves go to the even neighbour")
  x = 0
  call quantize(x, 4_c_int64_t, values, scales)
  call check(all(values == 0) .and. abs(scales(1)) <= 0, "zeros have scale 0")
  x(2) = transfer(7_c_int32_t, 1.0_c_float)
  x(3) = -transfer(1_c_int32_t, 1.0_c_float)
  call quantize(x, 4_c_int64_t, values, scales)
  call check(all(values == [0, 127, -127, 0]), "an infinite factor saturates all but 0")
  x(1) = huge(x)
  x(4) = x(1) * x(1)
  call quantize(x, 4_c_int64_t, values, scales)
  call check(all(values == 0) .and. .not. scales(1) <= huge(x), "an infinity gives a scale that is no number")

  turned = [1.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]
  call rotate(turned, 4_c_int64_t)
  call check(all(abs(turned - [0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]) <= 0), "rotation of unit vectors, block by block")
  call finish()
end program test_quantization
