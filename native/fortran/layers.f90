! Whole linear layers, SPEC.md sections 2 to 6: rotate, round, multiply, rotate back
!
! trellis  y = scale * H_out (levels @ H_in (input_scale * x))      int8  y = scale * (rows @ H_in (input_scale * x))
! split    y = weights @ x                                          the bias is the caller's
module septet_layers
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int64_t
  use septet_activations, only: quantize, rotate, segment_count
  use septet_codes, only: tile_inputs, tile_outputs, trellis_tile
  use septet_float_products, only: split_row_float, split_weights, trellis_row_float
  use septet_products, only: int8_dot, split_row, trellis_row
  implicit none
  private
  public :: layer, linear, dequantize, product_int8, product_float, padded_inputs, padded_outputs
  public :: code_split, code_trellis, code_int8

  integer, parameter :: code_split = 0, code_trellis = 1, code_int8 = 2

  !> One layer. K inputs, N outputs; sizes are checked by whoever fills it
  type :: layer
    integer :: code = code_trellis, bits = 7
    integer(c_int64_t) :: inputs = 0, outputs = 0, input_block = 1, output_block = 1
    !> Inputs that share an activation scale; for split also those that share steps and offsets
    integer(c_int64_t) :: segment = 0
    !> Bytes of a tile, tiles of a row, rows of tiles; or for int8 K, N, 1
    integer(c_int8_t), pointer, contiguous :: weight(:, :, :) => null()
    !> N x 1; split: 64 * rows x 2 * groups
    real(c_float), pointer, contiguous :: scale(:, :) => null(), offset(:, :) => null()
    real(c_float), pointer, contiguous :: input_scale(:) => null()
  end type layer

contains

  !> Inputs rounded up to whole tiles; int8 has none
  elemental integer(c_int64_t) function padded_inputs(l)
    type(layer), intent(in) :: l
    padded_inputs = l%inputs
    if (l%code /= code_int8) padded_inputs = (l%inputs + tile_inputs - 1) / tile_inputs * tile_inputs
  end function padded_inputs

  !> Outputs rounded up to whole tiles; int8 has none
  elemental integer(c_int64_t) function padded_outputs(l)
    type(layer), intent(in) :: l
    padded_outputs = l%outputs
    if (l%code /= code_int8) padded_outputs = (l%outputs + tile_outputs - 1) / tile_outputs * tile_outputs
  end function padded_outputs

  !> y(:, m) of x(:, m) for every token m; `failed` when there is no memory for what lies between
  subroutine linear(l, x, float_activations, y, failed)
    type(layer), intent(in) :: l
    real(c_float), intent(in), contiguous :: x(:, :)
    logical, intent(in) :: float_activations
    real(c_float), intent(out), contiguous :: y(:, :)
    logical, intent(out) :: failed
    real(c_float), allocatable :: rotated(:, :), scales(:, :), products(:, :)
    integer(c_int8_t), allocatable :: values(:, :)
    integer(c_int64_t) :: tokens
    integer :: status
    integer(c_int64_t) :: m
    tokens = size(x, 2, c_int64_t)
    allocate (rotated(padded_inputs(l), tokens), values(padded_inputs(l), tokens), products(padded_outputs(l), tokens), &
              scales(segment_count(padded_inputs(l), l%segment), tokens), stat=status)
    failed = status /= 0
    if (failed) return
    do concurrent (m = 1:tokens)
      call enter(l, x(:, m), rotated(:, m))
    end do
    if (float_activations) then
      call product_float(l, rotated, products)
    else
      do concurrent (m = 1:tokens)
        call quantize(rotated(:, m), l%segment, values(:, m), scales(:, m))
      end do
      call product_int8(l, values, scales, products)
    end if
    do concurrent (m = 1:tokens)
      call leave(l, products(:, m), y(:, m))
    end do
  end subroutine linear

  !> H_in (input_scale * x), and zeros up to whole tiles
  pure subroutine enter(l, x, rotated)
    type(layer), intent(in) :: l
    real(c_float), intent(in), contiguous :: x(:)
    real(c_float), intent(out), contiguous :: rotated(:)
    rotated(:l%inputs) = x
    if (associated(l%input_scale)) rotated(:l%inputs) = x * l%input_scale
    rotated(l%inputs + 1:) = 0
    if (l%input_block > 1) call rotate(rotated(:l%inputs), l%input_block)
  end subroutine enter

  !> scale * H_out (products) of the true outputs; split and int8 have no output side
  pure subroutine leave(l, products, y)
    type(layer), intent(in) :: l
    real(c_float), intent(in), contiguous :: products(:)
    real(c_float), intent(out), contiguous :: y(:)
    y = products(:l%outputs)
    if (l%code /= code_trellis) return
    if (l%output_block > 1) call rotate(y, l%output_block)
    y = y * l%scale(:, 1)
  end subroutine leave

  subroutine product_int8(l, values, scales, y)
    type(layer), intent(in) :: l
    integer(c_int8_t), intent(in), contiguous :: values(:, :)
    real(c_float), intent(in), contiguous :: scales(:, :)
    real(c_float), intent(out), contiguous :: y(:, :)
    if (l%code == code_int8) then
      call int8_product(l%weight(:, :, 1), l%scale(:, 1), values, scales(1, :), y)
    else
      call tile_product(l, values, scales, y)
    end if
  end subroutine product_int8

  !> Rows of tiles are independent of each other
  subroutine tile_product(l, values, scales, y)
    type(layer), intent(in) :: l
    integer(c_int8_t), intent(in), contiguous :: values(:, :)
    real(c_float), intent(in), contiguous :: scales(:, :)
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int64_t) :: r
    do concurrent (r = 1:size(l%weight, 3, c_int64_t))
      call tile_row(l, r, values, scales, y)
    end do
  end subroutine tile_product

  pure subroutine tile_row(l, r, values, scales, y)
    type(layer), intent(in) :: l
    integer(c_int64_t), intent(in) :: r
    integer(c_int8_t), intent(in), contiguous :: values(:, :)
    real(c_float), intent(in), contiguous :: scales(:, :)
    real(c_float), intent(inout), contiguous :: y(:, :)
    integer(c_int64_t) :: first, last
    first = (r - 1) * tile_outputs + 1
    last = r * tile_outputs
    if (l%code == code_trellis) then
      call trellis_row(l%weight(:, :, r), l%bits, values, scales, l%segment, y(first:last, :))
    else if (associated(l%offset)) then
      call split_row(l%weight(:, :, r), l%scale(first:last, :), l%offset(first:last, :), values, scales, l%segment, &
                     y(first:last, :))
    else
      call split_row(l%weight(:, :, r), l%scale(first:last, :), x=values, scales=scales, group=l%segment, y=y(first:last, :))
    end if
  end subroutine tile_row

  subroutine product_float(l, x, y)
    type(layer), intent(in) :: l
    real(c_float), intent(in), contiguous :: x(:, :)
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int64_t) :: m, r
    if (l%code == code_int8) then
      do concurrent (m = 1:size(x, 2, c_int64_t), r = 1:l%outputs)
        y(r, m) = l%scale(r, 1) * float_dot(l%weight(:, r, 1), x(:, m))
      end do
      return
    end if
    do concurrent (r = 1:size(l%weight, 3, c_int64_t))
      call tile_row_float(l, r, x, y)
    end do
  end subroutine product_float

  pure subroutine tile_row_float(l, r, x, y)
    type(layer), intent(in) :: l
    integer(c_int64_t), intent(in) :: r
    real(c_float), intent(in), contiguous :: x(:, :)
    real(c_float), intent(inout), contiguous :: y(:, :)
    integer(c_int64_t) :: first, last
    first = (r - 1) * tile_outputs + 1
    last = r * tile_outputs
    if (l%code == code_trellis) then
      call trellis_row_float(l%weight(:, :, r), l%bits, x, y(first:last, :))
    else if (associated(l%offset)) then
      call split_row_float(l%weight(:, :, r), l%scale(first:last, :), l%offset(first:last, :), x, l%segment, y(first:last, :))
    else
      call split_row_float(l%weight(:, :, r), l%scale(first:last, :), x=x, group=l%segment, y=y(first:last, :))
    end if
  end subroutine tile_row_float

  pure real(c_float) function float_dot(weight, x)
    integer(c_int8_t), intent(in), contiguous :: weight(:)
    real(c_float), intent(in), contiguous :: x(:)
    float_dot = dot_product(real(weight, c_float), x)
  end function float_dot

  !> Code "int8": y(r, m) = scale(r) * (scales(m) * exact sum)
  subroutine int8_product(weight, scale, values, scales, y)
    integer(c_int8_t), intent(in), contiguous :: weight(:, :), values(:, :)
    real(c_float), intent(in), contiguous :: scale(:)
    real(c_float), intent(in) :: scales(:)
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int64_t) :: m, r
    do concurrent (m = 1:size(values, 2, c_int64_t), r = 1:size(weight, 2, c_int64_t))
      y(r, m) = scale(r) * (scales(m) * real(int8_dot(weight(:, r), values(:, m)), c_float))
    end do
  end subroutine int8_product

  !> The weights themselves, K x N: weights(k, n) is what output n makes of input k
  subroutine dequantize(l, weights)
    type(layer), intent(in) :: l
    real(c_float), intent(out), contiguous :: weights(:, :)
    real(c_float) :: column(l%outputs)
    integer(c_int64_t) :: k
    integer(c_int64_t) :: n
    if (l%code == code_int8) then
      do concurrent (n = 1:l%outputs)
        weights(:, n) = l%scale(n, 1) * real(l%weight(:, n, 1), c_float)
      end do
    else
      call tile_weights(l, weights)
    end if
    if (l%input_block > 1) then
      do concurrent (n = 1:l%outputs)
        call rotate(weights(:, n), l%input_block)
      end do
    end if
    do k = 1, l%inputs
      column = weights(k, :)
      if (l%output_block > 1) call rotate(column, l%output_block)
      if (l%code == code_trellis) column = column * l%scale(:, 1)
      if (associated(l%input_scale)) column = column * l%input_scale(k)
      weights(k, :) = column
    end do
  end subroutine dequantize

  subroutine tile_weights(l, weights)
    type(layer), intent(in) :: l
    real(c_float), intent(out), contiguous :: weights(:, :)
    integer(c_int8_t) :: levels(tile_outputs, tile_inputs)
    real(c_float) :: tile(tile_outputs, tile_inputs)
    integer(c_int64_t) :: r, t, k, n
    do r = 0, size(l%weight, 3) - 1
      do t = 0, size(l%weight, 2) - 1
        n = min(int(tile_outputs, c_int64_t), l%outputs - r * tile_outputs)
        k = min(int(tile_inputs, c_int64_t), l%inputs - t * tile_inputs)
        associate (first => r * tile_outputs + 1, last => (r + 1) * tile_outputs, packed => l%weight(:, t + 1, r + 1))
          if (l%code == code_trellis) then
            call trellis_tile(packed, l%bits, levels)
            tile = real(levels, c_float)
          else if (associated(l%offset)) then
            call split_weights(packed, l%scale(first:last, :), l%offset(first:last, :), tile_inputs * t / l%segment, tile)
          else
            call split_weights(packed, l%scale(first:last, :), group=tile_inputs * t / l%segment, weights=tile)
          end if
        end associate
        weights(t * tile_inputs + 1:t * tile_inputs + k, r * tile_outputs + 1:r * tile_outputs + n) = transpose(tile(:n, :k))
      end do
    end do
  end subroutine tile_weights
end module septet_layers
