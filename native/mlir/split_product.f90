! The product of code "split" in one file, from packed bytes to scaled outputs: what `make mlir` takes through every level of MLIR
!
! One group per output. y(n, m) = scale(m) * (s4*E + s3*O + z4*XE + z3*XO), SPEC.md sections 1, 2 and 5; outputs and tokens are independent,
! which is what `do concurrent` says and what becomes scf.parallel.
subroutine split_product(tiles, outputs, tokens, packed, step, offset, x, scale, y) bind(C, name="split_product")
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int32_t
  implicit none
  integer(c_int32_t), value, intent(in) :: tiles, outputs, tokens
  integer(c_int8_t), intent(in) :: packed(0:111, 0:tiles - 1, 0:(outputs + 63) / 64 - 1), x(0:4 * tiles - 1, 0:tokens - 1)
  real(c_float), intent(in) :: step(2, 0:outputs - 1), offset(2, 0:outputs - 1), scale(0:tokens - 1)
  real(c_float), intent(out) :: y(0:outputs - 1, 0:tokens - 1)
  integer(c_int32_t) :: n, m

  do concurrent (m = 0:tokens - 1, n = 0:outputs - 1)
    y(n, m) = scale(m) * output(n, m)
  end do

contains

  pure real(c_float) function output(n, m)
    integer(c_int32_t), intent(in) :: n, m
    integer(c_int32_t) :: t, word, even, odd, even_inputs, odd_inputs
    even = 0
    odd = 0
    even_inputs = 0
    odd_inputs = 0
    do t = 0, tiles - 1
      word = word_of(t, n)
      even = even + ibits(word, 0, 4) * x(4 * t, m) + ibits(word, 7, 4) * x(4 * t + 2, m)
      odd = odd + ibits(word, 4, 3) * x(4 * t + 1, m) + ibits(word, 11, 3) * x(4 * t + 3, m)
      even_inputs = even_inputs + x(4 * t, m) + x(4 * t + 2, m)
      odd_inputs = odd_inputs + x(4 * t + 1, m) + x(4 * t + 3, m)
    end do
    output = step(1, n) * real(even, c_float)
    output = output + step(2, n) * real(odd, c_float)
    output = output + offset(1, n) * real(even_inputs, c_float)
    output = output + offset(2, n) * real(odd_inputs, c_float)
  end function output

  !> Both symbols of output n in tile t: 14 bits, of two or three bytes
  pure integer(c_int32_t) function word_of(t, n)
    integer(c_int32_t), intent(in) :: t, n
    integer(c_int32_t) :: o, first
    o = iand(n, 63)
    first = 14 * o / 8
    word_of = iand(int(packed(first, t, n / 64), c_int32_t), 255)
    word_of = ior(word_of, ishft(iand(int(packed(first + 1, t, n / 64), c_int32_t), 255), 8))
    word_of = ior(word_of, ishft(iand(int(packed(min(first + 2, 111), t, n / 64), c_int32_t), 255), 16))
    word_of = ibits(word_of, mod(14 * o, 8), 14)
  end function word_of
end subroutine split_product
