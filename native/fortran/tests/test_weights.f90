! Loading: numbers of every stored type, and the checksum; the program's argument is an empty directory to write in
program test_weights
  use, intrinsic :: iso_c_binding, only: c_float, c_int8_t, c_int32_t, c_int64_t
  use septet_asserting, only: check, finish
  use septet_tensor_file, only: crc32, float16, has_tensor, open_tensors, read_bytes, read_floats, tensor_file
  implicit none
  character(len=*), parameter :: header = '{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"h":{"dtype":"F16",' &
    //'"shape":[3],"data_offsets":[24,30]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[30,34]}}'
  integer(c_int32_t), parameter :: words(6) = [0, 1065353216, -1073741824, 1056964608, 1077936128, 1]
  integer(c_int8_t), parameter :: halves(10) = int([0, 60, 1, -128, -1, 123, -128, 63, 32, -63], c_int8_t)
  character(len=512) :: directory
  type(tensor_file) :: file
  integer(c_int8_t), pointer :: bytes(:)

  call get_command_argument(1, directory)
  call check(crc32(transfer("123456789", [0_c_int8_t])) == int(z'4BF43926') - 2147483647 - 1, "CRC-32 of the usual text")
  call check(abs(float16(15360) - 1) <= 0 .and. abs(float16(49152) + 2) <= 0, "halves 1 and -2")
  call check(abs(float16(1) - 2.0_c_float**(-24)) <= 0 .and. abs(float16(31743) - 65504) <= 0, "the smallest and the largest half")
  call check(.not. float16(31744) <= huge(1.0) .and. .not. abs(float16(32256)) <= huge(1.0), "infinity and NaN")
  call write_files(trim(directory))
  call open_tensors(trim(directory), file)
  call check(all(transfer(read_floats(file, "w", [3_c_int64_t, 2_c_int64_t]), words) == words), "F32")
  call check(all(abs(read_floats(file, "h", [3_c_int64_t]) - [1.0, -2.0_c_float**(-24) * 1, 65504.0]) <= 0), "F16")
  call check(all(abs(read_floats(file, "b", [2_c_int64_t]) - [1.0, -10.0]) <= 0), "BF16")
  bytes => read_bytes(file, "h", "F16", [3_c_int64_t])
  call check(all(bytes == halves(:6)), "bytes as they are")
  call check(has_tensor(file, "w") .and. .not. has_tensor(file, "dtype"), "names of tensors only")
  call finish()

contains

  subroutine write_files(directory)
    character(len=*), intent(in) :: directory
    character(len=8) :: sums(3)
    integer :: unit
    write (sums(1), '(z8.8)') crc32(transfer(words, [0_c_int8_t]))
    write (sums(2), '(z8.8)') crc32(halves(:6))
    write (sums(3), '(z8.8)') crc32(halves(7:))
    open (newunit=unit, file=directory//"/model.safetensors", access="stream", form="unformatted", action="write")
    write (unit) int(len(header), c_int64_t), header, words, halves
    close (unit)
    open (newunit=unit, file=directory//"/config.json", access="stream", form="unformatted", action="write")
    write (unit) '{"quantization_config":{"crc32":{"w":"'//lower(sums(1))//'","h":"'//lower(sums(2))//'","b":"'
    write (unit) lower(sums(3))//'"}}}'
    close (unit)
  end subroutine write_files

  pure function lower(string) result(small)
    character(len=*), intent(in) :: string
    character(len=len(string)) :: small
    integer :: i, at
    small = string
    do i = 1, len(string)
      at = index("ABCDEF", string(i:i))
      if (at > 0) small(i:i) = "abcdef"(at:at)
    end do
  end function lower
end program test_weights
