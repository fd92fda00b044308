-- Removes consumers that hold nothing. The next read of a living consumer creates it again.
--
-- KEYS    1 stream
-- ARGV    1 group; then the consumers, at most 100
-- result  the number of consumers that were removed
local removed = 0
for i = 2, #ARGV do
  local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[i])
  if not rows.err and #rows == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[i])
    removed = removed + 1
  end
end
return removed
