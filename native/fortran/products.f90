! The core: products of int8 activations with packed weights, one row of tiles (64 outputs) at a time
!
! y = sum over segments of scale * (exact integer sum of the segment). Integers are exact in any order; the float steps are in the
! order of SPEC.md section 5. A chunk of eight tiles is decoded once and used by all tokens. Two products of a level or field with
! an activation fit 16 bits (2 * 127 * 128 < 2**15), and so do those of eight tiles of fields (16 * 15 * 128): that fills vectors best.
module septet_products
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int16_t, c_int32_t, c_int64_t
  use septet_codes, only: chunk, in_order, split_words, tile_inputs, tile_outputs, trellis_tile
  implicit none
  private
  public :: trellis_row, trellis_row_sums, split_row, int8_dot, decode_levels

contains

  !> Code "trellis": y(:, m) = sum over segments s of scales(s, m) * (levels @ x(:, m) in segment s)
  pure subroutine trellis_row(packed, bits, x, scales, segment, y)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :), x(:, :)
    integer, intent(in) :: bits
    real(c_float), intent(in), contiguous :: scales(:, :)
    integer(c_int64_t), intent(in) :: segment
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int8_t) :: levels(tile_outputs, tile_inputs * chunk)
    integer(c_int32_t) :: sums(tile_outputs, size(x, 2))
    integer(c_int64_t) :: first, last, k, stop, s
    integer :: m
    sums = 0
    y = 0
    do first = 1, size(x, 1, c_int64_t), tile_inputs * chunk
      last = min(first + tile_inputs * chunk - 1, size(x, 1, c_int64_t))
      call decode_levels(packed(:, (first + 3) / 4:last / 4), bits, levels)
      do m = 1, size(x, 2)
        k = first
        do while (k <= last)
          s = (k - 1) / segment + 1
          stop = last
          if (last - k >= segment - mod(k - 1, segment)) stop = k + segment - mod(k - 1, segment) - 1
          call add_products(levels(:, k - first + 1:stop - first + 1), x(k:stop, m), sums(:, m))
          if (mod(stop, segment) == 0 .or. stop == size(x, 1, c_int64_t)) then
            y(:, m) = y(:, m) + scales(s, m) * real(sums(:, m), c_float)
            sums(:, m) = 0
          end if
          k = stop + 1
        end do
      end do
    end do
  end subroutine trellis_row

  !> Code "trellis": sums(:, m) = levels @ x(:, m)
  pure subroutine trellis_row_sums(packed, bits, x, sums)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :), x(:, :)
    integer, intent(in) :: bits
    integer(c_int32_t), intent(out), contiguous :: sums(:, :)
    integer(c_int8_t) :: levels(tile_outputs, tile_inputs * chunk)
    integer :: first, last, m
    sums = 0
    do first = 1, size(x, 1), tile_inputs * chunk
      last = min(first + tile_inputs * chunk - 1, size(x, 1))
      call decode_levels(packed(:, (first + 3) / 4:last / 4), bits, levels)
      do m = 1, size(x, 2)
        call add_products(levels(:, 1:last - first + 1), x(first:last, m), sums(:, m))
      end do
    end do
  end subroutine trellis_row_sums

  pure subroutine decode_levels(packed, bits, levels)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :)
    integer, intent(in) :: bits
    integer(c_int8_t), intent(inout) :: levels(tile_outputs, tile_inputs, chunk)
    integer :: t
    do t = 1, size(packed, 2)
      call trellis_tile(packed(:, t), bits, levels(:, :, t))
    end do
  end subroutine decode_levels

  !> sums = sums + levels @ x, two inputs at a time
  pure subroutine add_products(levels, x, sums)
    integer(c_int8_t), intent(in), contiguous :: levels(:, :), x(:)
    integer(c_int32_t), intent(inout) :: sums(tile_outputs)
    integer(c_int16_t) :: a, b
    integer :: k, o
    do k = 1, size(x) - 1, 2
      a = int(x(k), c_int16_t)
      b = int(x(k + 1), c_int16_t)
      do o = 1, tile_outputs
        sums(o) = sums(o) + int(int(levels(o, k), c_int16_t) * a + int(levels(o, k + 1), c_int16_t) * b, c_int32_t)
      end do
    end do
    if (mod(size(x), 2) == 1) sums = sums + int(levels(:, size(x)), c_int32_t) * int(x(size(x)), c_int32_t)
  end subroutine add_products

  !> Code "split": y(:, m) = sum over groups g of scales(g, m) * (s4*E + s3*O + z4*XE + z3*XO), added from left to right
  !
  ! E and O are the sums over even and odd inputs of the group, fields times activations; XE and XO those of the activations alone.
  ! Without offsets the zero points 8 and 4 are taken off E and O instead. step and offset hold s4, s3 and z4, z3 of group 1, 2, ...
  pure subroutine split_row(packed, step, offset, x, scales, group, y)
    integer(c_int8_t), intent(in), contiguous :: packed(:, :), x(:, :)
    real(c_float), intent(in), contiguous :: step(:, :), scales(:, :)
    real(c_float), intent(in), contiguous, optional :: offset(:, :)
    integer(c_int64_t), intent(in) :: group
    real(c_float), intent(out), contiguous :: y(:, :)
    integer(c_int16_t) :: words(tile_outputs, chunk)
    integer(c_int32_t) :: sums(tile_outputs, 2, size(x, 2))
    real(c_float) :: t(tile_outputs)
    integer(c_int64_t) :: g, first, last, stop
    integer :: m, tiles
    y = 0
    do g = 1, size(scales, 1, c_int64_t)
      stop = (g - 1) * group + min(group, size(x, 1, c_int64_t) - (g - 1) * group)
      sums = 0
      do first = (g - 1) * group + 1, stop, tile_inputs * chunk
        last = min(first + tile_inputs * chunk - 1, stop)
        tiles = int(last - first + 1) / tile_inputs
        call split_words(tiles, packed(:, (first + 3) / 4:last / 4), words)
        do m = 1, size(x, 2)
          call add_fields(words(:, :tiles), x(first:last, m), sums(:, 1, m), sums(:, 2, m))
        end do
      end do
      do m = 1, size(x, 2)
        associate (inputs => x((g - 1) * group + 1:stop, m), even => in_order(sums(:, 1, m)), odd => in_order(sums(:, 2, m)))
          if (present(offset)) then
            t = step(:, 2 * g - 1) * real(even, c_float)
            t = t + step(:, 2 * g) * real(odd, c_float)
            t = t + offset(:, 2 * g - 1) * real(sum(int(inputs(1::2), c_int32_t)), c_float)
            t = t + offset(:, 2 * g) * real(sum(int(inputs(2::2), c_int32_t)), c_float)
          else
            t = step(:, 2 * g - 1) * real(even - 8 * sum(int(inputs(1::2), c_int32_t)), c_float)
            t = t + step(:, 2 * g) * real(odd - 4 * sum(int(inputs(2::2), c_int32_t)), c_float)
          end if
          y(:, m) = y(:, m) + scales(g, m) * t
        end associate
      end do
    end do
  end subroutine split_row

  !> even and odd sums of at most eight tiles, in 16 bits until the end
  pure subroutine add_fields(words, x, even, odd)
    integer(c_int16_t), intent(in), contiguous :: words(:, :)
    integer(c_int8_t), intent(in) :: x(tile_inputs, size(words, 2))
    integer(c_int32_t), intent(inout) :: even(tile_outputs), odd(tile_outputs)
    integer(c_int16_t) :: e(tile_outputs), o(tile_outputs), a(tile_inputs)
    integer :: t, n
    e = 0
    o = 0
    do t = 1, size(words, 2)
      a = int(x(:, t), c_int16_t)
      do n = 1, tile_outputs
        e(n) = e(n) + ibits(words(n, t), 0, 4) * a(1) + ibits(words(n, t), 7, 4) * a(3)
        o(n) = o(n) + ibits(words(n, t), 4, 3) * a(2) + ibits(words(n, t), 11, 3) * a(4)
      end do
    end do
    even = even + int(e, c_int32_t)
    odd = odd + int(o, c_int32_t)
  end subroutine add_fields

  !> Exact product of two rows of int8
  pure integer(c_int32_t) function int8_dot(weight, x)
    integer(c_int8_t), intent(in), contiguous :: weight(:), x(:)
    integer(c_int64_t) :: k
    int8_dot = 0
    do k = 1, size(weight, kind=c_int64_t)
      int8_dot = int8_dot + int(weight(k), c_int32_t) * int(x(k), c_int32_t)
    end do
  end function int8_dot
end module septet_products
