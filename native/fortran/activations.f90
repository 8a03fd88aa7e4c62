! Activations, SPEC.md sections 4 and 5: the rotation by butterflies, and dynamic rounding to int8
!
! Every operation rounds to float32 on its own; the build forbids fused multiply-adds.
module septet_activations
  use, intrinsic :: ieee_arithmetic, only: ieee_quiet_nan, ieee_value
  use, intrinsic :: iso_c_binding, only: c_double, c_float, c_int8_t, c_int64_t
  implicit none
  private
  public :: rotate, quantize, segment_count

contains

  !> Segments of `segment` inputs, the last one perhaps shorter
  elemental integer(c_int64_t) function segment_count(inputs, segment)
    integer(c_int64_t), intent(in) :: inputs, segment
    segment_count = inputs / segment + merge(1, 0, mod(inputs, segment) > 0)
  end function segment_count

  !> Multiply blocks of one token's values with the normalized Hadamard matrix
  pure subroutine rotate(x, block)
    real(c_float), intent(inout), contiguous :: x(:)
    integer(c_int64_t), intent(in) :: block
    integer(c_int64_t) :: half, first
    half = 1
    do while (half < block)
      do first = 1, size(x, kind=c_int64_t), 2 * half
        call butterflies(x(first:first + half - 1), x(first + half:first + 2 * half - 1))
      end do
      half = 2 * half
    end do
    x = x * real(1 / sqrt(real(block, c_double)), c_float)
  end subroutine rotate

  pure subroutine butterflies(a, b)
    real(c_float), intent(inout), contiguous :: a(:), b(:)
    real(c_float) :: difference
    integer :: i
    do i = 1, size(a)
      difference = a(i) - b(i)
      a(i) = a(i) + b(i)
      b(i) = difference
    end do
  end subroutine butterflies

  !> One token to int8, with one scale per segment
  pure subroutine quantize(x, segment, values, scales)
    real(c_float), intent(in), contiguous :: x(:)
    integer(c_int64_t), intent(in) :: segment
    integer(c_int8_t), intent(out), contiguous :: values(:)
    real(c_float), intent(out), contiguous :: scales(:)
    integer(c_int64_t) :: s, first, last
    do s = 1, size(scales, kind=c_int64_t)
      first = (s - 1) * segment + 1
      last = first + min(segment - 1, size(x, kind=c_int64_t) - first)
      call quantize_segment(x(first:last), values(first:last), scales(s))
    end do
  end subroutine quantize

  pure subroutine quantize_segment(x, values, scale)
    real(c_float), intent(in), contiguous :: x(:)
    integer(c_int8_t), intent(out), contiguous :: values(:)
    real(c_float), intent(out) :: scale
    real(c_float) :: largest, factor
    if (.not. all(abs(x) <= huge(x))) then
      scale = ieee_value(scale, ieee_quiet_nan)
      values = 0_c_int8_t
      return
    end if
    largest = maxval(abs(x))
    scale = largest / 127
    factor = 127 / largest
    values = rounded(x, factor)
  end subroutine quantize_segment

  !> rint(x * factor) within -127 .. 127, half to even; 0 stays 0 even where factor is infinite
  elemental integer(c_int8_t) function rounded(x, factor)
    real(c_float), intent(in) :: x, factor
    !> 1.5 * 2**23: numbers of this size have no bits for fractions, so adding it rounds
    real(c_float), parameter :: rounding = 12582912
    real(c_float) :: scaled
    scaled = min(max(x * factor, -127.0_c_float), 127.0_c_float)
    rounded = merge(int((scaled + rounding) - rounding, c_int8_t), 0_c_int8_t, abs(x) > 0)
  end function rounded
end module septet_activations
