! Products against plain sums over the decoded matrix: every code and width, odd segments, long and negative sums
program test_product
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int32_t, c_int64_t
  use septet_asserting, only: check, finish
  use septet_codes, only: pack_tile, split_fields, trellis_tile, window_levels
  use septet_products, only: int8_dot, split_row, trellis_row, trellis_row_sums
  implicit none
  integer :: bits

  do bits = 6, 8
    call test_trellis(bits, 4_c_int64_t, 1_c_int64_t)
    call test_trellis(bits, 36_c_int64_t, 7_c_int64_t)
    call test_trellis(bits, 400_c_int64_t, 64_c_int64_t)
    call test_trellis(bits, 28672_c_int64_t, 28672_c_int64_t)
  end do
  call test_every_window()
  call test_every_code()
  call test_split(4_c_int64_t, 4_c_int64_t, .true.)
  call test_split(132_c_int64_t, 16_c_int64_t, .true.)
  call test_split(132_c_int64_t, 64_c_int64_t, .false.)
  call test_split(28672_c_int64_t, 28672_c_int64_t, .true.)
  call check(int8_dot([int(-128, c_int8_t), 127_c_int8_t], [int(-128, c_int8_t), 1_c_int8_t]) == 16384 + 127, "int8_dot")
  call finish()

contains

  !> Bytes that look random, the smallest one among them
  function some_bytes(count, seed) result(bytes)
    integer(c_int64_t), intent(in) :: count
    integer, intent(in) :: seed
    integer(c_int8_t), allocatable :: bytes(:)
    integer(c_int64_t) :: i, state
    allocate (bytes(count))
    state = seed
    do i = 1, count
      state = mod(16807 * state, 2147483647_c_int64_t)
      bytes(i) = int(mod(state / 64, 256_c_int64_t) - 128, c_int8_t)
    end do
  end function some_bytes

  subroutine test_trellis(bits, inputs, segment)
    integer, intent(in) :: bits
    integer(c_int64_t), intent(in) :: inputs, segment
    integer(c_int8_t), allocatable :: packed(:, :), x(:, :), levels(:, :)
    real(c_float), allocatable :: scales(:, :), y(:, :), wanted(:)
    integer(c_int32_t), allocatable :: sums(:, :)
    integer(c_int64_t) :: s, first, last, t, m
    packed = reshape(some_bytes(4 * bits * inputs, bits), [16_c_int64_t * bits, inputs / 4])
    x = reshape(some_bytes(2 * inputs, 5), [inputs, 2_c_int64_t])
    x(:, 2) = -128
    allocate (levels(64, inputs), y(64, 2), sums(64, 2), scales((inputs + segment - 1) / segment, 2))
    scales = reshape([(1 / real(t + 2, c_float), t=1, size(scales))], shape(scales))
    do t = 1, inputs / 4
      call trellis_tile(packed(:, t), bits, levels(:, 4 * t - 3:4 * t))
    end do
    call trellis_row_sums(packed, bits, x, sums)
    call trellis_row(packed, bits, x, scales, segment, y)
    do m = 1, 2
      call check(all(sums(:, m) == matmul(int(levels), int(x(:, m)))), "trellis sums are exact")
      wanted = [(0.0_c_float, t=1, 64)]
      do s = 1, size(scales, 1)
        first = (s - 1) * segment + 1
        last = min(s * segment, inputs)
        wanted = wanted + scales(s, m) * real(matmul(int(levels(:, first:last)), int(x(first:last, m))), c_float)
      end do
      call check(all(abs(y(:, m) - wanted) <= 0), "trellis product, segment by segment")
    end do
    call check(any(sums < 0), "some sums are negative")
  end subroutine test_trellis

  !> All 65536 windows of 8-bit pairs: a tile that repeats two bytes has one window at even pairs and the swapped one at odd pairs
  subroutine test_every_window()
    integer(c_int8_t) :: packed(128, 1), x(4, 1), both(4)
    integer(c_int32_t) :: sums(64, 1), window, swapped
    integer :: wrong
    x(:, 1) = int([-128, 127, 3, -77], c_int8_t)
    wrong = 0
    do window = 0, 65535
      swapped = ishftc(window, 8, 16)
      packed(1::2, 1) = byte_of(ibits(window, 0, 8))
      packed(2::2, 1) = byte_of(ibits(window, 8, 8))
      both = [window_levels(window, 8), window_levels(swapped, 8)]
      call trellis_row_sums(packed, 8, x, sums)
      if (any(sums(:, 1) /= sum(int(both) * int(x(:, 1))))) wrong = wrong + 1
    end do
    call check(wrong == 0, "the product of every window")
  end subroutine test_every_window

  !> All 128 codes of split at once, each in its own pair of one tile, times activations of both signs, with 4 and 3 bits apart
  subroutine test_every_code()
    integer(c_int8_t) :: packed(112, 1), x(4, 1)
    real(c_float) :: scales(1, 1), step(64, 2), y(64, 1)
    integer :: p, code(2), wanted(2, 64)
    call pack_tile([(byte_of(p), p=0, 127)], 7, packed(:, 1))
    x(:, 1) = int([-128, 127, 3, -77], c_int8_t)
    do p = 1, 64
      code = [2 * p - 2, 2 * p - 1]
      wanted(1, p) = sum((iand(code, 15) - 8) * int(x(1::2, 1)))
      wanted(2, p) = sum((code / 16 - 4) * int(x(2::2, 1)))
    end do
    scales = 1
    do p = 1, 2
      step = 0
      step(:, p) = 1
      call split_row(packed, step, x=x, scales=scales, group=4_c_int64_t, y=y)
      call check(all(abs(y(:, 1) - real(wanted(p, :), c_float)) <= 0), "the product of every code of split")
    end do
  end subroutine test_every_code

  elemental integer(c_int8_t) function byte_of(value)
    integer, intent(in) :: value
    byte_of = int(value - 256 * (value / 128), c_int8_t)
  end function byte_of

  subroutine test_split(inputs, group, asymmetric)
    integer(c_int64_t), intent(in) :: inputs, group
    logical, intent(in) :: asymmetric
    integer(c_int8_t), allocatable :: packed(:, :), x(:, :), fields(:, :)
    real(c_float), allocatable :: scales(:, :), step(:, :), offset(:, :), y(:, :), wanted(:), t(:)
    integer(c_int64_t) :: g, first, last, i, groups
    groups = (inputs + group - 1) / group
    packed = reshape(some_bytes(28 * inputs, 9), [112_c_int64_t, inputs / 4])
    x = reshape(some_bytes(inputs, 3), [inputs, 1_c_int64_t])
    allocate (fields(64, inputs), y(64, 1), scales(groups, 1), step(64, 2 * groups), offset(64, 2 * groups))
    scales = 0.25
    step = reshape([(1 / real(i + 5, c_float), i=1, size(step))], shape(step))
    offset = -3 * step
    do i = 1, inputs / 4
      call split_fields(packed(:, i), fields(:, 4 * i - 3:4 * i))
    end do
    if (.not. asymmetric) then
      fields(:, 1::2) = fields(:, 1::2) - 8_c_int8_t
      fields(:, 2::2) = fields(:, 2::2) - 4_c_int8_t
      call split_row(packed, step, x=x, scales=scales, group=group, y=y)
    else
      call split_row(packed, step, offset, x, scales, group, y)
    end if
    wanted = [(0.0_c_float, i=1, 64)]
    do g = 1, groups
      first = (g - 1) * group + 1
      last = min(g * group, inputs)
      t = step(:, 2 * g - 1) * real(matmul(int(fields(:, first:last:2)), int(x(first:last:2, 1))), c_float)
      t = t + step(:, 2 * g) * real(matmul(int(fields(:, first + 1:last:2)), int(x(first + 1:last:2, 1))), c_float)
      if (asymmetric) then
        t = t + offset(:, 2 * g - 1) * real(sum(int(x(first:last:2, 1))), c_float)
        t = t + offset(:, 2 * g) * real(sum(int(x(first + 1:last:2, 1))), c_float)
      end if
      wanted = wanted + scales(g, 1) * t
    end do
    call check(all(abs(y(:, 1) - wanted) <= 0), "split product with its offset term")
  end subroutine test_split
end program test_product
