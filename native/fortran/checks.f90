! Argument checks of the C interface, and its error numbers
module septet_checks
  use, intrinsic :: iso_c_binding, only: c_associated, c_int, c_int64_t, c_ptr
  use septet_layers, only: code_int8, code_split, code_trellis
  implicit none
  private
  public :: fits, is_block, check_matrix, check_stream, check_sizes

  integer(c_int), parameter, public :: ok = 0, null_pointer = 1, wrong_size = 2, wrong_bits = 3, wrong_block = 4, &
                                       wrong_group = 5, wrong_code = 6, wrong_range = 7, wrong_threads = 8, no_memory = 11
  integer(c_int64_t), parameter, public :: most_inputs = 131071
  integer(c_int64_t), parameter :: most_elements = 2_c_int64_t**46

contains

  !> Whether two sizes are not negative and their product is that of an array
  elemental logical function fits(a, b)
    integer(c_int64_t), intent(in) :: a, b
    fits = a >= 0 .and. b >= 0
    if (fits .and. b > 0) fits = a <= most_elements / b
  end function fits

  !> Whether `block` is a power of two that divides `features`
  elemental logical function is_block(block, features)
    integer(c_int64_t), intent(in) :: block, features
    is_block = block >= 1
    if (is_block) is_block = iand(block, block - 1) == 0 .and. mod(features, block) == 0
  end function is_block

  !> Arrays of tokens x features
  integer(c_int) function check_matrix(x, y, tokens, features) result(error)
    type(c_ptr), intent(in) :: x, y
    integer(c_int64_t), intent(in) :: tokens, features
    error = ok
    if (.not. fits(tokens, features)) then
      error = wrong_size
    else if (tokens > 0 .and. features > 0 .and. .not. (c_associated(x) .and. c_associated(y))) then
      error = null_pointer
    end if
  end function check_matrix

  !> Arrays of single tiles
  integer(c_int) function check_stream(from, to, tiles, bits) result(error)
    type(c_ptr), intent(in) :: from, to
    integer(c_int64_t), intent(in) :: tiles
    integer(c_int), intent(in) :: bits
    error = check_matrix(from, to, tiles, 256_c_int64_t)
    if (bits < 6 .or. bits > 8) error = wrong_bits
  end function check_stream

  !> K and N of a matrix of a code
  integer(c_int) function check_sizes(code, bits, inputs, outputs) result(error)
    integer(c_int), intent(in) :: code, bits
    integer(c_int64_t), intent(in) :: inputs, outputs
    error = ok
    if (all(code /= [code_split, code_trellis, code_int8])) then
      error = wrong_code
    else if (code /= code_int8 .and. (bits < 6 .or. bits > 8) .or. code == code_split .and. bits /= 7) then
      error = wrong_bits
    else if (inputs < 1 .or. inputs > most_inputs .or. .not. fits(outputs, inputs) .or. outputs < 1) then
      error = wrong_size
    end if
  end function check_sizes
end module septet_checks
