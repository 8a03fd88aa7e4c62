! Products of float32 activations with packed weights, and weights as floats
!
! The order of additions is open here (SPEC.md section 5): a chunk of tiles becomes float32 weights, which all tokens then use.
module septet_float_products
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int64_t
  use septet_codes, only: chunk, split_fields, tile_inputs, tile_outputs
  use septet_products, only: decode_levels
  implicit none
  private
  public :: trellis_row_float, split_row_float, split_weights

contains

  !> Code "trellis": y = levels @ x
  pure subroutine trellis_row_float(packed, bits, x, y)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :)
    integer, intent(in) :: bits
    real(c_float), intent(in), contiguous :: x(:, :)
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int8_t) :: levels(tile_outputs, tile_inputs * chunk)
    integer :: first, last
    y = 0
    do first = 1, size(x, 1), tile_inputs * chunk
      last = min(first + tile_inputs * chunk - 1, size(x, 1))
      call decode_levels(packed(:, (first + 3) / 4:last / 4), bits, levels)
      call add_products(real(levels(:, 1:last - first + 1), c_float), x(first:last, :), y)
    end do
  end subroutine trellis_row_float

  !> Code "split": y = weights @ x; arguments as `split_row`
  pure subroutine split_row_float(packed, step, offset, x, group, y)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :)
    real(c_float), intent(in), contiguous :: step(:, :), x(:, :)
    real(c_float), intent(in), contiguous, optional :: offset(:, :)
    integer(c_int64_t), intent(in) :: group
    real(c_float), intent(out), contiguous :: y(:, :)
    real(c_float) :: weights(tile_outputs, tile_inputs)
    integer(c_int64_t) :: t
    y = 0
    do t = 1, size(packed, 2)
      call split_weights(packed(:, t), step, offset, (tile_inputs * (t - 1)) / group, weights)
      call add_products(weights, x(tile_inputs * (t - 1) + 1:tile_inputs * t, :), y)
    end do
  end subroutine split_row_float

  !> Weights of one tile, which lies in group 0, 1, ...
  pure subroutine split_weights(tile, step, offset, group, weights)
    integer(c_int8_t), intent(in) :: tile(112)
    real(c_float), intent(in), contiguous :: step(:, :)
    real(c_float), intent(in), contiguous, optional :: offset(:, :)
    integer(c_int64_t), intent(in) :: group
    real(c_float), intent(out) :: weights(tile_outputs, tile_inputs)
    real(c_float), parameter :: zero_points(0:1) = [8, 4]
    integer(c_int8_t) :: fields(tile_outputs, tile_inputs)
    integer :: i, kind
    call split_fields(tile, fields)
    do i = 1, tile_inputs
      kind = mod(i - 1, 2)
      associate (s => step(:, 2 * group + 1 + kind))
        if (present(offset)) then
          weights(:, i) = s * real(fields(:, i), c_float) + offset(:, 2 * group + 1 + kind)
        else
          weights(:, i) = s * (real(fields(:, i), c_float) - zero_points(kind))
        end if
      end associate
    end do
  end subroutine split_weights

  pure subroutine add_products(weights, x, y)
    real(c_float), intent(in), contiguous :: weights(:, :), x(:, :)
    real(c_float), intent(inout), contiguous :: y(:, :)
    integer :: k, m
    do m = 1, size(x, 2)
      do k = 1, size(x, 1)
        y(:, m) = y(:, m) + weights(:, k) * x(k, m)
      end do
    end do
  end subroutine add_products
end module septet_float_products
